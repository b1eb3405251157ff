//! Hosts that are not believed, or are not another host: certificates, peers, and a destination that is the source.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};

use end_to_end::{Pair, vmirror};
use link::certificates::{IssueOptions, Validity, issue_with};
use testbed::Host;

use super::{allow, pair, reconfigure};

/// A new authority in that directory, and a certificate of it for the host.
fn other_authority(host: &Host, directory: &Path) {
    let dir = directory.to_str().unwrap();
    let address = host.listen().ip().to_string();
    let _ = vmirror(host, &["cert", "init", "--dir", dir]).done();
    let _ =
        vmirror(host, &["cert", "issue", "--dir", dir, "--name", host.name(), "--address", &address]).done();
}

fn use_certificates(config: &mut toml::Table, directory: &Path, host: &Host) {
    let tls = config["tls"].as_table_mut().unwrap();
    let (cert, key) = (format!("{}.pem", host.name()), format!("{}-key.pem", host.name()));
    for (part, file) in [("ca", "ca.pem"), ("cert", &cert), ("key", &key)] {
        tls.insert(part.to_owned(), directory.join(file).to_str().unwrap().into());
    }
}

/// A certificate of the testbed's own authority for that host, valid until then.
fn issue_until(pair: &Pair, host: &Host, not_after: SystemTime) -> PathBuf {
    let directory = pair.testbed().directory().join(format!("short-lived-{}", host.name()));
    fs::create_dir_all(&directory).unwrap();
    for file in ["ca.pem", "ca-key.pem"] {
        fs::copy(pair.testbed().certificates().join(file), directory.join(file)).unwrap();
    }
    let validity = Validity { not_before: SystemTime::now() - Duration::from_secs(3600), not_after };
    let addresses = [host.listen().ip().to_string()];
    issue_with(&directory, host.name(), &addresses, &IssueOptions::new(validity)).unwrap();
    directory
}

#[test]
fn an_agent_of_another_authority_is_not_believed() {
    let pair = pair();
    let directory = pair.testbed().directory().join("other-authority");
    other_authority(pair.b(), &directory);
    reconfigure(pair.b(), |config| use_certificates(config, &directory, pair.b()));
    pair.migration_refused("vm", &[]).is("not-trusted", &["same authority"]);
    // In the other direction too.
    pair.run_tiny(pair.b(), "other", &[]);
    let to = pair.a().listen().to_string();
    pair.refused(pair.b(), &["migrate", "other", "--to", &to]).is("not-trusted", &["same authority"]);
}

#[test]
fn an_agent_does_not_start_with_a_certificate_that_has_expired() {
    let pair = pair();
    let host = pair.b();
    host.stop_agent().unwrap();
    let directory = issue_until(&pair, host, SystemTime::now() - Duration::from_secs(60));
    host.configure(|config| use_certificates(config, &directory, host)).unwrap();
    let refusal = pair.refused(host, &["agent", "--config", host.config_path().to_str().unwrap()]);
    refusal.is("certificates", &["host-b.pem", "expired on", "vmirror cert issue"]);
}

#[test]
fn a_certificate_that_expires_while_its_agent_runs_is_not_believed_any_more() {
    let pair = pair();
    // Long enough for two agents to start on a busy machine; one that cannot start fails this aloud.
    let expiry = SystemTime::now() + Duration::from_secs(15);
    for host in [pair.a(), pair.b()] {
        let directory = issue_until(&pair, host, expiry);
        reconfigure(host, |config| use_certificates(config, &directory, host));
    }
    let left = expiry.duration_since(SystemTime::now()).unwrap_or_default();
    thread::sleep(left + Duration::from_secs(2));
    pair.migration_refused("vm", &[]).is("not-trusted", &["expired"]);
    // Now only the source's has expired, which the destination says.
    let good = pair.testbed().certificates();
    reconfigure(pair.b(), |config| use_certificates(config, &good, pair.b()));
    pair.migration_refused("vm", &[]).is("not-trusted", &["expired"]);
}

#[test]
fn a_peer_that_is_not_on_the_list_gets_nothing() {
    let pair = pair();
    reconfigure(pair.b(), |config| allow(config, "peers", vec!["host-c".to_owned()]));
    let refusal = pair.migration_refused("vm", &[]);
    refusal.is("peer-not-allowed", &["host-b does not take VMs from host-a", "[allow] peers"]);
    assert_eq!(pair.check("vm"), ["peer-not-allowed"]);
}

#[test]
fn a_destination_that_is_the_source_is_refused() {
    let pair = pair();
    let own = pair.a().listen().to_string();
    pair.refused(pair.a(), &["migrate", "vm", "--to", &own]).is("same-host", &[&own, "host-a"]);
    assert_eq!(vmirror(pair.a(), &["check", "vm", "--to", &own]).code, Some(2));
    // Its own agent by another of its names: whatever the address is, the certificate says who answers.
    let directory = pair.testbed().directory().join("two-addresses");
    let host = pair.a();
    fs::create_dir(&directory).unwrap();
    for file in ["ca.pem", "ca-key.pem"] {
        fs::copy(pair.testbed().certificates().join(file), directory.join(file)).unwrap();
    }
    let addresses = [host.listen().ip().to_string(), "127.0.0.77".to_owned()];
    issue_with(&directory, host.name(), &addresses, &IssueOptions::default()).unwrap();
    reconfigure(host, |config| {
        use_certificates(config, &directory, host);
        config.insert("listen".into(), format!("0.0.0.0:{}", host.listen().port()).into());
    });
    let other = format!("127.0.0.77:{}", host.listen().port());
    pair.refused(host, &["migrate", "vm", "--to", &other]).is("same-host", &[&other, "host-a"]);
}
