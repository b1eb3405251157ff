//! Guests that may have guests of their own.
//!
//! With VMX a processor writes into memory of the guest that is not mapped for anybody: a virtual APIC page and a descriptor of posted
//! interrupts for each CPU of a guest of the guest. KVM has these pages pinned meanwhile, and marks them in its own log only, which a
//! mirror does not read.

use qemu::qmp::CpuidWord;
use qemu::{Qmp, QmpError};

use finding::Finding;

/// CPUID 1, ECX: the guest may use VMX.
const VMX: u32 = 1 << 5;

/// What the operator of a machine is told whose guest may have guests of its own by VMX.
///
/// # Errors
/// If QEMU does not answer.
pub async fn check(qmp: &Qmp) -> Result<Option<Finding>, QmpError> {
    let is_vmx = |word: &CpuidWord| word.leaf == 1 && word.register == "ECX" && word.features & VMX != 0;
    Ok(qmp.cpuid_words().await?.iter().any(is_vmx).then(|| {
        Finding::new(
            "nested-guests",
            "the guest's CPU has vmx: of what the processor writes for guests of the guest, tracking sees only a part",
            "have the guest end its own VMs before it is migrated, or start it with vmx=off in -cpu; do not turn the proof off (--verify gate)",
        )
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use testing::{Says, qemu};

    fn says(command: &str, features: u32) -> Vec<Value> {
        let word = |leaf: u32, register: &str, features: u32| json!({"cpuid-input-eax": leaf, "cpuid-register": register, "features": features});
        vec![match command {
            "query-cpus-fast" => {
                json!({"return": [{"cpu-index": 0, "qom-path": "/machine/cpu", "thread-id": 1, "props": {}, "target": "x86_64"}]})
            }
            // VMX's bit in other words is something else.
            "qom-get" => {
                json!({"return": [word(1, "EDX", VMX), word(7, "ECX", VMX), word(1, "ECX", features)]})
            }
            other => panic!("{other}"),
        }]
    }

    async fn told(says: Says) -> Option<String> {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        qemu(&socket, says);
        let qmp = Qmp::connect(&socket).await.unwrap();
        check(&qmp).await.unwrap().map(|found| found.kind)
    }

    #[tokio::test]
    async fn of_a_guest_that_may_have_guests_of_its_own_it_is_said_what_tracking_misses() {
        assert_eq!(told(|command| says(command, VMX | 1)).await.as_deref(), Some("nested-guests"));
        assert_eq!(told(|command| says(command, !VMX)).await, None);
        // Another architecture has no such words.
        let other: Says = |command| match command {
            "qom-get" => vec![json!({"error": {"class": "GenericError", "desc": "no such property"}})],
            command => says(command, VMX),
        };
        assert_eq!(told(other).await, None);
    }
}
