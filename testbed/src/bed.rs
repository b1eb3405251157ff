//! The testbed as a whole.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::TestbedError;
use crate::addresses::{CLIENT_ADDRESS, GUEST_PREFIX};
use crate::client::Client;
use crate::host::{Host, Place};
use crate::name;
use crate::namespace::Namespace;
use crate::places::Places;
use crate::programs::Programs;
use crate::sweep::sweep;
use crate::times::Timed;
use crate::wire::{self, Disturbance, Wire};

/// The agents' port where each host has an address of its own.
const LINK_PORT: u16 = 7600;

/// Two hosts, and what is between them. Removed with everything in it when dropped.
#[derive(Debug)]
pub struct Testbed {
    hosts: [Host; 2],
    network: Option<Network>,
    directory: PathBuf,
    // Last, so that what is taken away is in it.
    _timed: Timed,
}

#[derive(Debug)]
struct Network {
    client: Client,
    switch: Namespace,
}

impl Testbed {
    /// A testbed of network namespaces, with the programs found as [`Programs::find`] does.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`], or whatever keeps it from being made.
    pub fn new() -> Result<Self, TestbedError> {
        Self::with(&Programs::find())
    }

    /// A testbed of network namespaces, with these programs.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`], or whatever keeps it from being made.
    pub fn with(programs: &Programs) -> Result<Self, TestbedError> {
        Self::networked(programs, Ipv4Addr::new(10, 9, 0, 3))
    }

    /// As [`Testbed::new`], with host B in subnets of its own, behind a router: its guests' network is another one than that of host A
    /// and the client, and the agents' network too.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`], or whatever keeps it from being made.
    pub fn routed() -> Result<Self, TestbedError> {
        let testbed = Self::networked(&Programs::find(), Ipv4Addr::new(10, 9, 1, 3))?;
        let (switch, b) = testbed.ends(testbed.b())?;
        wire::separate(switch, testbed.b().letter())?;
        let a = testbed.ends(testbed.a())?.1;
        switch.ip(&["address", "add", "10.9.0.1/24", "dev", wire::LINK_BRIDGE])?;
        switch.ip(&["address", "add", "10.9.1.1/24", "dev", wire::OTHER_LINK_BRIDGE])?;
        switch.set("net/ipv4/ip_forward", "1")?;
        a.ip(&["route", "add", "10.9.1.0/24", "via", "10.9.0.1"])?;
        b.ip(&["route", "add", "10.9.0.0/24", "via", "10.9.1.1"])?;
        Ok(testbed)
    }

    fn networked(programs: &Programs, address_of_b: Ipv4Addr) -> Result<Self, TestbedError> {
        if !rustix::process::geteuid().is_root() {
            return Err(TestbedError::NotRoot);
        }
        sweep();
        let name = name::next();
        let directory = Directory::new(&name)?;
        let switch = Namespace::new(format!("{name}-switch"))?;
        wire::add_bridge(&switch, wire::BRIDGE)?;
        wire::add_bridge(&switch, wire::LINK_BRIDGE)?;

        let client = Arc::new(Namespace::new(format!("{name}-client"))?);
        wire::connect(&switch, &client, "client", Wire::Uplink)?;
        client.ip(&["address", "add", &format!("{CLIENT_ADDRESS}/{GUEST_PREFIX}"), "dev", wire::UPLINK])?;

        let host = |letter: &str, address: Ipv4Addr| {
            let namespace = Arc::new(Namespace::new(format!("{name}-{letter}"))?);
            wire::connect(&switch, &namespace, letter, Wire::Uplink)?;
            wire::connect(&switch, &namespace, letter, Wire::Link)?;
            wire::add_bridge(&namespace, wire::BRIDGE)?;
            namespace.ip(&["link", "set", wire::UPLINK, "master", wire::BRIDGE])?;
            namespace.ip(&["address", "add", &format!("{address}/24"), "dev", wire::LINK])?;
            let listen = SocketAddr::from((address, LINK_PORT));
            Host::new(&name, letter, &directory.0, Place::Namespace(namespace), listen, programs)
        };
        let hosts = [host("a", Ipv4Addr::new(10, 9, 0, 2))?, host("b", address_of_b)?];
        let network = Network { client: Client::in_namespace(client), switch };
        Self::certified(hosts, Some(network), directory, programs)
    }

    /// Two hosts on loopback, for a user without privileges: no namespaces, no guests' network.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    pub fn rootless() -> Result<Self, TestbedError> {
        Self::rootless_with(&Programs::find())
    }

    /// As [`Testbed::rootless`], with these programs.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    pub fn rootless_with(programs: &Programs) -> Result<Self, TestbedError> {
        sweep();
        let name = name::next();
        let directory = Directory::new(&name)?;
        // Held together, so that the two are not given the same port; an agent that then finds its port taken fails aloud.
        let listeners = [free_port()?, free_port()?];
        let address = |listener: &TcpListener| listener.local_addr().map_err(TestbedError::Network);
        let listen = [address(&listeners[0])?, address(&listeners[1])?];
        drop(listeners);
        let host =
            |letter: &str, listen| Host::new(&name, letter, &directory.0, Place::Loopback, listen, programs);
        let hosts = [host("a", listen[0])?, host("b", listen[1])?];
        Self::certified(hosts, None, directory, programs)
    }

    fn certified(
        hosts: [Host; 2],
        network: Option<Network>,
        directory: Directory,
        programs: &Programs,
    ) -> Result<Self, TestbedError> {
        let testbed = Self { hosts, network, directory: directory.keep(), _timed: Timed::begin() };
        testbed.certify(programs)?;
        Ok(testbed)
    }

    /// Makes the authority and a certificate for each host, where there is a vmirror to make them with.
    fn certify(&self, programs: &Programs) -> Result<(), TestbedError> {
        let Some(vmirror) = programs.vmirror.as_ref().and_then(|path| path.to_str()) else { return Ok(()) };
        let certificates = self.directory.join("certificates");
        let certificates = certificates.to_string_lossy();
        crate::tool::run(vmirror, &["cert", "init", "--dir", &certificates])?;
        for host in &self.hosts {
            let address = host.listen().ip().to_string();
            let arguments =
                ["cert", "issue", "--dir", &certificates, "--name", host.name(), "--address", &address];
            crate::tool::run(vmirror, &arguments)?;
        }
        Ok(())
    }

    /// Host A.
    pub fn a(&self) -> &Host {
        &self.hosts[0]
    }

    /// Host B.
    pub fn b(&self) -> &Host {
        &self.hosts[1]
    }

    /// Both hosts.
    pub fn hosts(&self) -> &[Host; 2] {
        &self.hosts
    }

    /// The client; none in a rootless testbed.
    pub fn client(&self) -> Option<&Client> {
        self.network.as_ref().map(|network| &network.client)
    }

    /// The testbed's own directory: certificates, and one directory per host.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory of the authority and the hosts' certificates: `ca.pem`, `host-a.pem`, `host-a-key.pem` and so on.
    pub fn certificates(&self) -> PathBuf {
        self.directory.join("certificates")
    }

    /// Limits a host's cable to that many bits per second, in each direction.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`] in a rootless testbed, or what `tc` says.
    pub fn set_rate(&self, host: &Host, wire: Wire, bits_per_second: u64) -> Result<(), TestbedError> {
        let (switch, namespace) = self.ends(host)?;
        wire::set_rate(switch, namespace, host.letter(), wire, bits_per_second)
    }

    /// Takes the limit of a host's cable away.
    ///
    /// # Errors
    /// As [`Testbed::set_rate`].
    pub fn clear_rate(&self, host: &Host, wire: Wire) -> Result<(), TestbedError> {
        let (switch, namespace) = self.ends(host)?;
        wire::clear_rate(switch, namespace, host.letter(), wire)
    }

    /// Cuts a host's cable: neither side is told, nothing arrives any more.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`] in a rootless testbed, or what `bridge` says.
    pub fn cut(&self, host: &Host, wire: Wire) -> Result<(), TestbedError> {
        wire::set_connected(self.ends(host)?.0, host.letter(), wire, false)
    }

    /// Mends a cable that was cut.
    ///
    /// # Errors
    /// As [`Testbed::cut`].
    pub fn mend(&self, host: &Host, wire: Wire) -> Result<(), TestbedError> {
        wire::set_connected(self.ends(host)?.0, host.letter(), wire, true)
    }

    /// Disturbs what comes to a host by a cable, and not what it sends.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`] in a rootless testbed, or what `nft` says.
    pub fn disturb(&self, host: &Host, wire: Wire, disturbance: Disturbance) -> Result<(), TestbedError> {
        wire::disturb(self.ends(host)?.0, host.letter(), wire, disturbance)
    }

    /// Nothing disturbs that cable any more.
    ///
    /// # Errors
    /// As [`Testbed::disturb`].
    pub fn undisturb(&self, host: &Host, wire: Wire) -> Result<(), TestbedError> {
        wire::undisturb(self.ends(host)?.0, host.letter(), wire)
    }

    /// The host behind whose port of the switch a station is, by its MAC address: as far as the switch has learned; none where it has
    /// not.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`] in a rootless testbed, or what `bridge` says.
    pub fn behind(&self, mac: &str) -> Result<Option<&Host>, TestbedError> {
        let network = self.network.as_ref().ok_or(TestbedError::NotRoot)?;
        let port = wire::port_of(&network.switch, mac)?;
        Ok(self.hosts.iter().find(|host| port.as_deref() == Some(&*Wire::Uplink.port(host.letter()))))
    }

    /// Watches what the switch learns about where stations are.
    ///
    /// # Errors
    /// [`TestbedError::NotRoot`] in a rootless testbed, or where there is no `bridge`.
    pub fn watch_places(&self) -> Result<Places, TestbedError> {
        Places::watch(&self.network.as_ref().ok_or(TestbedError::NotRoot)?.switch)
    }

    /// When the switch last learned that a station is behind a host's port.
    pub fn learned(&self, places: &Places, mac: &str, host: &Host) -> Option<SystemTime> {
        places.when(mac, &Wire::Uplink.port(host.letter()))
    }

    fn ends<'a>(&'a self, host: &'a Host) -> Result<(&'a Namespace, &'a Namespace), TestbedError> {
        let switch = self.network.as_ref().map(|network| &network.switch);
        switch.zip(host.namespace()).ok_or(TestbedError::NotRoot)
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        for host in &self.hosts {
            host.clear();
        }
        remove(self.a().consoles());
        remove(&self.directory);
    }
}

/// The testbed's directory while the rest is being made: gone again if that fails.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Result<Self, TestbedError> {
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).map_err(TestbedError::file(&path))?;
        Ok(Self(path))
    }

    fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            remove(&self.0);
        }
    }
}

fn remove(directory: &Path) {
    if let Err(error) = fs::remove_dir_all(directory) {
        eprintln!("testbed: {}: {error}", directory.display());
    }
}

fn free_port() -> Result<TcpListener, TestbedError> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(TestbedError::Network)
}
