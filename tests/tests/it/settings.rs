//! What another tool has left QEMU's own migration set to must not spoil a migration, and is there again where the VM stays.

use std::path::{Path, PathBuf};

use end_to_end::{Pair, until, vmirror};
use serde_json::{Map, Value, json};
use testbed::guest_spec::GuestSpec;
use testbed::{Host, Monitor};

/// Capabilities that outlive an attempt, and what else has to be on with them.
const CAPABILITIES: [&[&str]; 9] = [
    &["multifd"],
    &["postcopy-ram"],
    &["xbzrle"],
    &["return-path"],
    &["zero-blocks"],
    &["auto-converge"],
    &["dirty-bitmaps"],
    &["validate-uuid"],
    &["x-ignore-shared", "events"],
];

/// Parameters that do.
fn parameters() -> Vec<Value> {
    vec![
        json!({ "max-bandwidth": 65536 }),
        json!({ "tls-creds": "none0", "tls-hostname": "nowhere" }),
        json!({ "multifd-channels": 8 }),
        json!({ "max-postcopy-bandwidth": 4096, "downtime-limit": 1 }),
        json!({ "announce-initial": 2000, "announce-rounds": 50 }),
    ]
}

/// A machine with a monitor that is not the agent's.
fn run(pair: &Pair, host: &Host, name: &str) -> PathBuf {
    let monitor = host.directory().join(format!("{name}-own.qmp"));
    let socket = format!("unix:{},server=on,wait=off", monitor.display());
    pair.run_tiny(host, name, &["-qmp", &socket]);
    monitor
}

fn turn_on(qmp: &mut Monitor, capabilities: &[&str]) {
    let on: Vec<Value> =
        capabilities.iter().map(|name| json!({ "capability": name, "state": true })).collect();
    qmp.execute("migrate-set-capabilities", json!({ "capabilities": on })).unwrap();
}

/// Everything that QEMU's migration is set to.
fn settings(monitor: &Path) -> (Value, Value) {
    let mut qmp = Monitor::connect(monitor).unwrap();
    let mut parameters: Map<String, Value> =
        serde_json::from_value(qmp.execute("query-migrate-parameters", json!({})).unwrap()).unwrap();
    // Told of bitmaps only once there are any.
    parameters.remove("block-bitmap-mapping");
    (qmp.execute("query-migrate-capabilities", json!({})).unwrap(), Value::Object(parameters))
}

#[test]
fn what_another_tool_has_left_set_spoils_no_migration() {
    let pair = Pair::start();
    for engine in ["mirror", "qemu"] {
        let mut number = 0;
        let mut moves = |set: &dyn Fn(&mut Monitor), what: &str| {
            let name = format!("{engine}-{number}");
            number += 1;
            let monitor = run(&pair, pair.a(), &name);
            set(&mut Monitor::connect(&monitor).unwrap());
            let said = pair.try_migrate(&name, pair.a(), pair.b(), &["--engine", engine]);
            assert_eq!(said.code, Some(0), "{engine}, {what}: {said:?}\n{}", pair.logs());
            assert!(pair.runs_on(&name, pair.b()), "{engine}, {what}");
            let _ = vmirror(pair.b(), &["stop", &name, "--force"]).done();
        };
        for capabilities in CAPABILITIES {
            moves(&|qmp| turn_on(qmp, capabilities), &format!("{capabilities:?}"));
        }
        for parameters in parameters() {
            let set =
                |qmp: &mut Monitor| drop(qmp.execute("migrate-set-parameters", parameters.clone()).unwrap());
            moves(&set, &parameters.to_string());
        }
    }
}

/// What another tool may leave behind all at once.
fn leave_behind(monitor: &Path) -> (Value, Value) {
    let mut qmp = Monitor::connect(monitor).unwrap();
    turn_on(&mut qmp, &["postcopy-ram", "return-path", "zero-blocks", "late-block-activate"]);
    for parameters in parameters() {
        qmp.execute("migrate-set-parameters", parameters).unwrap();
    }
    drop(qmp);
    settings(monitor)
}

/// A machine of host A runs there, set to what it was before; and it moves all the same.
fn is_as_it_was(pair: &Pair, name: &str, monitor: &Path, before: &(Value, Value), engine: &str) {
    until("it runs where it was", || pair.runs_on(name, pair.a()));
    until("it has the settings that it had", || settings(monitor) == *before);
    let _ = pair.migrate(name, pair.a(), pair.b(), &["--engine", engine]);
    let _ = vmirror(pair.b(), &["stop", name, "--force"]).done();
}

#[test]
fn a_machine_that_stays_after_a_failed_switch_over_has_the_settings_that_it_had() {
    let pair = Pair::start();
    for (name, killed) in [("there", pair.b()), ("here", pair.a())] {
        // One that takes longer than a moment.
        let monitor = pair.a().directory().join(format!("{name}-own.qmp"));
        let spec = GuestSpec { qmp: Some(monitor.clone()), fill_mib: 64, ..pair.spec(name, 192) };
        let _ = pair.run(pair.a(), name, &spec);
        let before = leave_behind(&monitor);
        let (migration, stopped) = pair.switching_over(name);
        killed.kill_agent().unwrap();
        drop(stopped);
        let _ = migration.ended();
        killed.start_agent().unwrap();
        is_as_it_was(&pair, name, &monitor, &before, "mirror");
    }
}

#[test]
fn a_machine_whose_migration_by_qemu_was_cancelled_has_the_settings_that_it_had() {
    let pair = Pair::start();
    for (name, killed) in [("cancelled", false), ("killed", true)] {
        let monitor = run(&pair, pair.a(), name);
        let before = leave_behind(&monitor);
        let slow = ["--engine", "qemu", "--bandwidth", "64KiB/s"];
        let migration = pair.begin(name, pair.a(), pair.b(), &slow);
        migration.reaches("synchronize");
        if killed {
            pair.a().kill_agent().unwrap();
            pair.a().start_agent().unwrap();
        } else {
            let _ = vmirror(pair.a(), &["cancel", name]).done();
        }
        let _ = migration.ended();
        is_as_it_was(&pair, name, &monitor, &before, "qemu");
    }
}

#[test]
fn a_machine_that_has_arrived_can_be_migrated_by_hand() {
    let pair = Pair::start();
    for engine in ["mirror", "qemu"] {
        let monitor = run(&pair, pair.a(), engine);
        let _ = pair.migrate(engine, pair.a(), pair.b(), &["--engine", engine]);
        // On the command line, so it is there for the QEMU that the machine has now as well.
        until("what a migration needs is not set any more", || {
            let (capabilities, _) = settings(&monitor);
            capabilities.as_array().unwrap().iter().all(|capability| capability["state"] == false)
        });
        let _ = vmirror(pair.b(), &["stop", engine, "--force"]).done();
    }
}
