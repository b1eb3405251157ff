//! The commands that a migration needs, by verb, and what they answer.
//!
//! Answers are read into types of our own where the `qapi` crate's have enums that a newer QEMU may extend
//! (run states, migration states, CPU kinds).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Instant;

use command_line::BlockDriver;
use qapi::Command;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::connection::Qmp;
use super::error::QmpError;

/// The command by which devices are saved without RAM.
pub const SAVE_DEVICES: &str = "xen-save-devices-state";
/// By which what it writes to is known among QEMU's descriptors, also to a later agent.
const DEVICE_STATE: &str = "vmirror-device-state";

/// QEMU's version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Micro number.
    pub micro: u32,
    /// The distributor's suffix; may be empty.
    #[serde(default)]
    pub package: String,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Whether and how the machine runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RunState {
    /// QEMU's word: `running`, `paused`, `inmigrate`, `postmigrate`, `guest-panicked`, ….
    pub status: String,
    /// Whether vCPUs run.
    pub running: bool,
}

/// A descriptor that QEMU was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct GivenDescriptor {
    /// The set that it is in.
    #[serde(rename = "fdset-id")]
    pub set: i64,
    /// Its number inside QEMU.
    #[serde(rename = "fd")]
    pub number: i32,
}

/// How a migration by QEMU stands.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct MigrationState {
    /// QEMU's word: `setup`, `active`, `pre-switchover`, `device`, `completed`, `failed`, `cancelled`, …; None: there was
    /// no migration.
    pub status: Option<String>,
    /// Why it failed.
    #[serde(rename = "error-desc")]
    pub error: Option<String>,
    /// Milliseconds so far, or in all.
    #[serde(rename = "total-time")]
    pub total_ms: Option<u64>,
    /// Milliseconds of pause as QEMU counts them.
    #[serde(rename = "downtime")]
    pub downtime_ms: Option<u64>,
    /// Milliseconds of set-up.
    #[serde(rename = "setup-time")]
    pub setup_ms: Option<u64>,
    /// The pause that QEMU expects, in milliseconds.
    #[serde(rename = "expected-downtime")]
    pub expected_downtime_ms: Option<u64>,
    /// How much QEMU slows the guest's CPUs (`auto-converge`), in percent of their time.
    #[serde(rename = "cpu-throttle-percentage")]
    pub throttle_percent: Option<u64>,
    /// QEMU's figures about RAM, as they come.
    #[serde(default)]
    pub ram: Value,
    /// Why the machine cannot be migrated at the moment, in QEMU's words.
    #[serde(default, rename = "blocked-reasons")]
    pub blocked: Vec<String>,
}

/// A vCPU and the host thread that runs it. With TCG several vCPUs may share a thread.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VcpuThread {
    /// Its number.
    #[serde(rename = "cpu-index")]
    pub index: u64,
    /// Its place in QEMU's object tree.
    #[serde(rename = "qom-path")]
    pub qom_path: String,
    /// The host's thread id.
    #[serde(rename = "thread-id")]
    pub thread_id: u32,
}

/// A word of CPUID that says which features a vCPU has.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuidWord {
    /// The leaf: EAX when the instruction is executed.
    #[serde(rename = "cpuid-input-eax")]
    pub leaf: u32,
    /// The sub-leaf: ECX, where the leaf has any.
    #[serde(rename = "cpuid-input-ecx")]
    pub subleaf: Option<u32>,
    /// The register that the answer is in.
    #[serde(rename = "cpuid-register")]
    pub register: String,
    /// A bit for each feature.
    pub features: u32,
}

/// Bits of CPUID that are no features of the CPU but follow from `-smp`, and show in some versions of QEMU only: HTT
/// and CmpLegacy, as (leaf, register, bit).
const TOPOLOGY_BITS: [(u32, &str, u32); 2] = [(1, "EDX", 28), (0x8000_0001, "ECX", 1)];

/// A property in QEMU's object tree.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct QomProperty {
    /// Its name.
    pub name: String,
    /// Its type: `bool`, `string`, `child<…>`, ….
    #[serde(rename = "type")]
    pub kind: String,
}

/// A memory device: DIMM, NVDIMM, virtio-mem, ….
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct MemoryDevice {
    /// `dimm`, `nvdimm`, `virtio-mem`, ….
    #[serde(rename = "type")]
    pub kind: String,
    /// Everything that QEMU says about it.
    pub data: Value,
}

impl MemoryDevice {
    /// Its id, if it has one.
    #[must_use]
    pub fn id(&self) -> Option<&str> {
        self.data.get("id").and_then(Value::as_str)
    }
}

/// QEMU's block nodes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Blocks {
    /// Files and host devices that are open as bottom nodes, by name as QEMU has it.
    pub files: Vec<String>,
    /// Files that are only open because an image names them as its backing file.
    pub backing_files: Vec<String>,
}

commands! {
    QueryVersion {} = "query-version" -> QueryVersionAnswer;
    QueryStatus {} = "query-status" -> RunState;
    QueryKvm {} = "query-kvm" -> QueryKvmAnswer;
    QueryCpus {} = "query-cpus-fast" -> Vec<VcpuThread>;
    QueryMigrate {} = "query-migrate" -> MigrationState;
    QueryMemoryDevices {} = "query-memory-devices" -> Vec<MemoryDevice>;
    QueryNodes {} = "query-named-block-nodes" -> Vec<Value>;
    QueryName {} = "query-name" -> QueryNameAnswer;
    Stop {} = "stop" -> Value;
    Cont {} = "cont" -> Value;
    Quit {} = "quit" -> Value;
    MigrateCancel {} = "migrate_cancel" -> Value;
    Migrate<'a> { uri: &'a str } = "migrate" -> Value;
    MigrateIncoming<'a> { uri: &'a str } = "migrate-incoming" -> Value;
    MigrateContinue<'a> { state: &'a str } = "migrate-continue" -> Value;
    QueryCapabilities {} = "query-migrate-capabilities" -> Vec<CapabilityState>;
    SetCapabilities<'a> { capabilities: Vec<Capability<'a>> } = "migrate-set-capabilities" -> Value;
    AnnounceSelf { initial: u32, max: u32, rounds: u32, step: u32 } = "announce-self" -> Value;
    QomList<'a> { path: &'a str } = "qom-list" -> Vec<QomProperty>;
    QomGet<'a> { path: &'a str, property: &'a str } = "qom-get" -> Value;
}

#[derive(Serialize)]
struct Capability<'a> {
    capability: &'a str,
    state: bool,
}

#[derive(Deserialize)]
struct CapabilityState {
    capability: String,
    state: bool,
}

#[derive(Deserialize)]
struct QueryVersionAnswer {
    qemu: Version,
    #[serde(default)]
    package: String,
}

#[derive(Deserialize)]
struct QueryKvmAnswer {
    enabled: bool,
}

#[derive(Deserialize)]
struct QueryNameAnswer {
    name: Option<String>,
}

/// Boolean properties of a vCPU object that are no CPU features but belong to every device or to QEMU's bookkeeping;
/// and two that follow from `-smp` and show in the properties of some versions only (QEMU 7.2 adds `ht` and
/// `cmp-legacy` when the guest asks CPUID, 10.0 when it makes the vCPU), though the guest sees the same in all.
const NOT_FEATURES: &[&str] = &[
    "realized",
    "hotplugged",
    "hotpluggable",
    "start-powered-off",
    "migratable",
    "fill-mtrr-mask",
    "ht",
    "cmp-legacy",
];

impl Qmp {
    /// QEMU's version.
    ///
    /// # Errors
    /// As every command here: [`QmpError`].
    pub async fn version(&self) -> Result<Version, QmpError> {
        let answer = self.execute(QueryVersion {}).await?;
        Ok(Version { package: answer.package, ..answer.qemu })
    }

    /// Whether the machine runs.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn status(&self) -> Result<RunState, QmpError> {
        let (asked, events) = (Instant::now(), self.event_count());
        let state = self.execute(QueryStatus {}).await?;
        // Of a guest that does not run not everything is told that becomes of it.
        if state.status == "running" {
            self.note_running(asked, events);
        }
        Ok(state)
    }

    /// The guest's name from `-name`.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn name(&self) -> Result<Option<String>, QmpError> {
        Ok(self.execute(QueryName {}).await?.name)
    }

    /// The versioned machine type, such as `pc-q35-7.2`, whatever alias the command line has.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn machine_type(&self) -> Result<String, QmpError> {
        let class: String = self.qom_get("/machine", "type").await?;
        Ok(class.strip_suffix("-machine").unwrap_or(&class).to_owned())
    }

    /// The capabilities of QEMU's migration, and whether each is on.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn capabilities(&self) -> Result<Vec<(String, bool)>, QmpError> {
        let all = self.execute(QueryCapabilities {}).await?;
        Ok(all.into_iter().map(|capability| (capability.capability, capability.state)).collect())
    }

    /// Turns capabilities of QEMU's migration on or off.
    ///
    /// # Errors
    /// [`QmpError::Refused`] if QEMU does not know one, or a migration is under way.
    pub async fn set_capabilities(&self, capabilities: &[(&str, bool)]) -> Result<(), QmpError> {
        let capabilities =
            capabilities.iter().map(|&(capability, state)| Capability { capability, state }).collect();
        self.execute(SetCapabilities { capabilities }).await.map(drop)
    }

    /// Sets parameters of QEMU's migration: `max-bandwidth`, `downtime-limit`, ….
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn set_parameters(&self, parameters: Value) -> Result<(), QmpError> {
        self.execute_raw("migrate-set-parameters", parameters).await.map(drop)
    }

    /// The parameters of QEMU's migration, as they come.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn migrate_parameters(&self) -> Result<Value, QmpError> {
        self.execute_raw("query-migrate-parameters", Value::Object(serde_json::Map::new())).await
    }

    /// Begins to send the machine's state to `uri`.
    ///
    /// # Errors
    /// [`QmpError::Refused`] with the reason if the machine cannot be migrated.
    pub async fn migrate(&self, uri: &str) -> Result<(), QmpError> {
        self.execute(Migrate { uri }).await.map(drop)
    }

    /// Begins to wait for a machine's state at `uri`; QEMU was started with `-incoming defer`.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn migrate_incoming(&self, uri: &str) -> Result<(), QmpError> {
        self.execute(MigrateIncoming { uri }).await.map(drop)
    }

    /// Lets a migration go on that stopped before the switch-over (capability `pause-before-switchover`).
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn migrate_continue(&self) -> Result<(), QmpError> {
        self.execute(MigrateContinue { state: "pre-switchover" }).await.map(drop)
    }

    /// Gives a migration up; the machine runs on where it was. No error if there is none.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.execute(MigrateCancel {}).await.map(drop)
    }

    /// How QEMU's migration stands.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn query_migrate(&self) -> Result<MigrationState, QmpError> {
        self.execute(QueryMigrate {}).await
    }

    /// Stops the vCPUs and drains the disks.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute(Stop {}).await.map(drop)
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute(Cont {}).await.map(drop)
    }

    /// Ends QEMU. That it closes the connection before it has answered counts as an answer.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn quit(&self) -> Result<(), QmpError> {
        match self.execute(Quit {}).await {
            Ok(_) | Err(QmpError::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes QEMU announce the guest's addresses on its networks: five times, at once and then 50 to 550 ms apart
    /// (QEMU's own defaults after a migration).
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn announce_self(&self) -> Result<(), QmpError> {
        self.execute(AnnounceSelf { initial: 50, max: 550, rounds: 5, step: 100 }).await.map(drop)
    }

    /// Gives QEMU a descriptor. Returns its number inside QEMU, where it stays open until
    /// [`take_descriptor_back`](Self::take_descriptor_back) or the end of the connection.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn give_descriptor(&self, descriptor: OwnedFd) -> Result<GivenDescriptor, QmpError> {
        self.give_named(descriptor, Value::Null).await
    }

    async fn give_named(&self, descriptor: OwnedFd, arguments: Value) -> Result<GivenDescriptor, QmpError> {
        let answer = self.execute_with("add-fd", arguments, descriptor).await?;
        GivenDescriptor::deserialize(&answer).map_err(|source| QmpError::Answer {
            command: "add-fd",
            answer: answer.to_string(),
            source,
        })
    }

    /// Has QEMU close a descriptor that it was given. It does so only while the guest runs.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn take_descriptor_back(&self, given: &GivenDescriptor) -> Result<(), QmpError> {
        let GivenDescriptor { set, number } = given;
        let arguments = serde_json::json!({ "fdset-id": set, "fd": number });
        self.execute_raw("remove-fd", arguments).await.map(drop)
    }

    /// Has QEMU write the state of its devices, without any RAM, to a descriptor, and returns when it has. Only of a guest that is stopped;
    /// QEMU gives its images up with that, as at the end of a migration, and takes them back when it is told to run (`cont`).
    ///
    /// It is the command that Xen's tools use (`xen-save-devices-state`), which needs no Xen. It does not ask what blocks migration.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn save_devices(&self, to: OwnedFd) -> Result<(), QmpError> {
        let given = self.give_named(to, serde_json::json!({ "opaque": DEVICE_STATE })).await?;
        let arguments = serde_json::json!({ "filename": format!("/dev/fdset/{}", given.set), "live": true });
        let saved = self.execute_raw(SAVE_DEVICES, arguments).await.map(drop);
        // QEMU writes to a duplicate. Some versions keep their own for as long as the guest is stopped.
        let taken = self.take_descriptor_back(&given).await;
        saved.and(taken)
    }

    /// Has QEMU close what [`save_devices`](Self::save_devices) has written to, if a version of before 9.1 still has it open: it closes a
    /// descriptor only while the guest runs, and only when it is told to or its last monitor goes.
    ///
    /// # Errors
    /// [`QmpError`].
    pub async fn close_saved_devices(&self) -> Result<(), QmpError> {
        for set in self.execute(qapi::qmp::query_fdsets {}).await? {
            for given in set.fds.iter().filter(|given| given.opaque.as_deref() == Some(DEVICE_STATE)) {
                let arguments = serde_json::json!({ "fdset-id": set.fdset_id, "fd": given.fd });
                self.execute_raw("remove-fd", arguments).await?;
            }
        }
        Ok(())
    }

    /// Whether QEMU has a command of that name.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn has_command(&self, name: &str) -> Result<bool, QmpError> {
        let commands = self.execute(qapi::qmp::query_commands {}).await?;
        Ok(commands.iter().any(|command| command.name == name))
    }

    /// The vCPUs and their threads.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn vcpus(&self) -> Result<Vec<VcpuThread>, QmpError> {
        self.execute(QueryCpus {}).await
    }

    /// Whether KVM runs the guest.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn kvm_enabled(&self) -> Result<bool, QmpError> {
        Ok(self.execute(QueryKvm {}).await?.enabled)
    }

    /// The features of vCPU 0 as the guest sees them: every boolean property of its object, after `-cpu host` and all
    /// defaults were expanded. Names with `_` are left out where QEMU has the same with `-`.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn cpu_features(&self) -> Result<BTreeMap<String, bool>, QmpError> {
        let Some(vcpu) = self.vcpus().await?.into_iter().next() else { return Ok(BTreeMap::new()) };
        let properties = self.qom_list(&vcpu.qom_path).await?;
        let names: Vec<&str> = properties
            .iter()
            .filter(|property| property.kind == "bool")
            .map(|property| property.name.as_str())
            .collect();
        let mut features = BTreeMap::new();
        for &name in &names {
            let is_alias = name.contains('_') && names.contains(&name.replace('_', "-").as_str());
            if is_alias || NOT_FEATURES.contains(&name) || name.starts_with("legacy-") {
                continue;
            }
            features.insert(name.to_owned(), self.qom_get(&vcpu.qom_path, name).await?);
        }
        Ok(features)
    }

    /// The CPUID feature words of vCPU 0, in one question where [`Qmp::cpu_features`] takes hundreds. Empty where the
    /// machine's CPUs have no CPUID.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn cpuid_words(&self) -> Result<Vec<CpuidWord>, QmpError> {
        let Some(vcpu) = self.vcpus().await?.into_iter().next() else { return Ok(Vec::new()) };
        let mut words: Vec<CpuidWord> = match self.qom_get(&vcpu.qom_path, "feature-words").await {
            Ok(words) => words,
            // No such property: another architecture.
            Err(QmpError::Refused { .. }) => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        for word in &mut words {
            for (leaf, register, bit) in TOPOLOGY_BITS {
                if word.leaf == leaf && word.register == register {
                    word.features &= !(1 << bit);
                }
            }
        }
        Ok(words)
    }

    /// DIMMs and other memory devices, hot-plugged ones too.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn memory_devices(&self) -> Result<Vec<MemoryDevice>, QmpError> {
        self.execute(QueryMemoryDevices {}).await
    }

    /// Files that are open for drives, those of backing files apart.
    ///
    /// # Errors
    /// [`QmpError`]
    pub async fn blocks(&self) -> Result<Blocks, QmpError> {
        let nodes = self.execute(QueryNodes {}).await?;
        let mut blocks = Blocks::default();
        for node in &nodes {
            // Whatever an image says is behind it, however deep.
            let mut image = node.get("image");
            while let Some(backing) = image.and_then(|image| image.get("backing-image")) {
                blocks
                    .backing_files
                    .extend(backing.get("filename").and_then(Value::as_str).map(str::to_owned));
                image = Some(backing);
            }
            let driver = node.get("drv").and_then(Value::as_str);
            if driver.is_some_and(|driver| BlockDriver::of(driver) == BlockDriver::Local) {
                blocks.files.extend(node.get("file").and_then(Value::as_str).map(str::to_owned));
            }
        }
        Ok(blocks)
    }

    /// The properties of an object in QEMU's tree.
    ///
    /// # Errors
    /// [`QmpError::Refused`] if there is no such object.
    pub async fn qom_list(&self, path: &str) -> Result<Vec<QomProperty>, QmpError> {
        self.execute(QomList { path }).await
    }

    /// A property of an object in QEMU's tree.
    ///
    /// # Errors
    /// [`QmpError::Refused`] if there is none; [`QmpError::Answer`] if it is of another type.
    pub async fn qom_get<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        property: &str,
    ) -> Result<T, QmpError> {
        let value = self.execute(QomGet { path, property }).await?;
        let answer = value.to_string();
        serde_json::from_value(value).map_err(|source| QmpError::Answer {
            command: QomGet::NAME,
            answer,
            source,
        })
    }
}
