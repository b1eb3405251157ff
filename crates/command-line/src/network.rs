//! Network back ends on the command line.

use crate::options::Properties;
use crate::spec::Spec;

/// A network back end and the address of the card on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// The back end's `id=`; for `-nic` and `-net` without one, a name of ours, `#nic0`, `#nic1`, …, by their place
    /// among such options. The key for [`super::Destination::taps`].
    pub netdev: String,
    /// What it is connected to.
    pub kind: NicKind,
    /// The card's MAC address, where the command line has one. None: QEMU counts up from 52:54:00:12:34:56.
    pub mac: Option<String>,
    /// Number of queue pairs.
    pub queues: u32,
    /// Whether the host's kernel moves the frames (vhost-net).
    pub vhost: bool,
}

/// What a network card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum NicKind {
    /// A tap interface.
    Tap {
        /// Its name; None: QEMU takes the next free `tapN`, or the descriptor was handed in.
        ifname: Option<String>,
        /// The script that configures it; None: QEMU's default, `no`: none.
        script: Option<String>,
        /// The bridge that QEMU's helper would join it to.
        bridge: Option<String>,
        /// Descriptors that QEMU was given by the program that started it (`fd=`, `fds=`), by their numbers in QEMU, one for each queue.
        descriptors: Vec<i32>,
    },
    /// A tap that QEMU's bridge helper makes and joins to this bridge.
    Bridge {
        /// `br=`, default `br0`.
        bridge: String,
    },
    /// QEMU's own user-mode stack. Its connections end with the process.
    User,
    /// A socket to another QEMU: `socket`, `stream`, `dgram`, `l2tpv3`, `vde`, by that name.
    Socket(String),
    /// A device in another process or in hardware: `vhost-user`, `vhost-vdpa`, by that name.
    Vhost(String),
    /// Another kind, by its name.
    Other(String),
}

impl Spec {
    /// Network back ends in the order of the command line. `-nic none` and unconnected cards are not among them. A
    /// command line that says nothing about networks gets QEMU's default: a card with user-mode networking.
    #[must_use]
    pub fn nics(&self) -> Vec<Nic> {
        let mut nics = Vec::new();
        for (at, properties) in self.backends() {
            let id = self.backend_key(at, &properties);
            let mac = properties.get("mac").or_else(|| match self.arguments[at].name() {
                "net" => self.legacy_mac(),
                _ => self.card_mac(&id),
            });
            nics.push(nic(id, mac, &properties));
        }
        let silent = ["netdev", "nic", "net", "nodefaults"].iter().all(|option| !self.has(option));
        if silent {
            nics.push(nic("#default".to_owned(), None, &Properties::new("type", "user")));
        }
        nics
    }

    /// The tap interfaces that have names, in order.
    #[must_use]
    pub fn taps(&self) -> Vec<String> {
        let tap = |nic: Nic| match nic.kind {
            NicKind::Tap { ifname, .. } => ifname,
            _ => None,
        };
        self.nics().into_iter().filter_map(tap).collect()
    }

    /// Options that declare a back end, with their positions.
    pub(crate) fn backends(&self) -> Vec<(usize, Properties)> {
        self.arguments
            .iter()
            .enumerate()
            .filter(|(_, argument)| matches!(argument.name(), "netdev" | "nic" | "net"))
            .map(|(at, argument)| (at, argument.properties()))
            .filter(|(_, properties)| {
                !matches!(properties.get("type").as_deref(), None | Some("none" | "nic" | "hubport"))
            })
            .collect()
    }

    /// The key by which a back end is known: its id, or one made from its place.
    pub(crate) fn backend_key(&self, at: usize, properties: &Properties) -> String {
        properties.get("id").unwrap_or_else(|| {
            let before = self
                .backends()
                .iter()
                .filter(|(other, found)| *other < at && found.get("id").is_none())
                .count();
            format!("#nic{before}")
        })
    }

    /// The MAC address of the device that uses a back end. A hub port stands for the back end behind it.
    fn card_mac(&self, id: &str) -> Option<String> {
        self.all("device").find(|(_, card)| card.get("netdev").as_deref() == Some(id))?.1.get("mac")
    }

    fn legacy_mac(&self) -> Option<String> {
        self.all("net")
            .find(|(_, properties)| properties.get("type").as_deref() == Some("nic"))
            .and_then(|(_, card)| card.get("macaddr").or_else(|| card.get("mac")))
    }
}

fn nic(netdev: String, mac: Option<String>, properties: &Properties) -> Nic {
    let kind = properties.get("type").unwrap_or_default();
    let count = |key: &str| properties.get(key).map(|list| list.split(':').count());
    let queues = properties
        .get("queues")
        .and_then(|text| text.parse().ok())
        .or_else(|| count("fds").and_then(|count| u32::try_from(count).ok()))
        .unwrap_or(1);
    let vhost = properties.is_on("vhost") || properties.is_on("vhostforce");
    let kind = match kind.as_str() {
        "tap" => NicKind::Tap {
            ifname: properties.get("ifname"),
            script: properties.get("script"),
            bridge: properties.get("br").or_else(|| properties.get("helper").map(|_| "br0".to_owned())),
            descriptors: descriptors(properties),
        },
        "bridge" => NicKind::Bridge { bridge: properties.get("br").unwrap_or_else(|| "br0".to_owned()) },
        "user" => NicKind::User,
        "socket" | "stream" | "dgram" | "l2tpv3" | "vde" => NicKind::Socket(kind),
        "vhost-user" | "vhost-vdpa" => NicKind::Vhost(kind),
        _ => NicKind::Other(kind),
    };
    Nic { netdev, kind, mac, queues, vhost }
}

/// The numbers in `fd=` or `fds=`. None where one of them is a name, which only QEMU knows.
fn descriptors(properties: &Properties) -> Vec<i32> {
    let list = properties.get("fd").or_else(|| properties.get("fds")).unwrap_or_default();
    list.split(':').map(|number| number.parse().ok()).collect::<Option<_>>().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nics(argv: &[&str]) -> Vec<Nic> {
        Spec::parse(&[&["q"], argv].concat()).unwrap().nics()
    }

    #[test]
    fn tap_with_card() {
        let found = nics(&[
            "-netdev",
            "tap,id=n0,ifname=t0,script=no,downscript=no,vhost=on,queues=4",
            "-device",
            "virtio-net-pci,netdev=n0,mac=52:54:00:00:00:01",
        ]);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].mac.as_deref(), Some("52:54:00:00:00:01"));
        assert_eq!((found[0].queues, found[0].vhost), (4, true));
        let NicKind::Tap { ifname, script, descriptors, .. } = &found[0].kind else { panic!("{found:?}") };
        assert_eq!((ifname.as_deref(), script.as_deref()), (Some("t0"), Some("no")));
        assert!(descriptors.is_empty());
    }

    #[test]
    fn shorthand_and_legacy_forms() {
        let found = nics(&["-nic", "bridge,br=lan,mac=52:54:00:00:00:02", "-nic", "user", "-nic", "none"]);
        assert_eq!(found[0].netdev, "#nic0");
        assert_eq!(found[0].kind, NicKind::Bridge { bridge: "lan".to_owned() });
        assert_eq!((found[1].netdev.as_str(), &found[1].kind), ("#nic1", &NicKind::User));
        assert_eq!(found.len(), 2);
        let found = nics(&["-net", "nic,macaddr=52:54:00:00:00:03", "-net", "tap"]);
        assert_eq!(found[0].mac.as_deref(), Some("52:54:00:00:00:03"));
    }

    #[test]
    fn silence_means_user_networking() {
        assert_eq!(nics(&[])[0].kind, NicKind::User);
        assert!(nics(&["-nodefaults"]).is_empty());
        assert!(nics(&["-nic", "none"]).is_empty());
        assert!(nics(&["-net", "none"]).is_empty());
    }

    #[test]
    fn descriptors_handed_in_as_libvirt_does() {
        let found = nics(&[
            "-netdev",
            r#"{"type":"tap","fds":"30:31","vhost":true,"vhostfds":"32:33","id":"hostnet0"}"#,
        ]);
        let NicKind::Tap { descriptors, .. } = &found[0].kind else { panic!("{found:?}") };
        assert_eq!(descriptors.as_slice(), [30, 31]);
        assert_eq!((found[0].queues, found[0].vhost), (2, true));
        let named = nics(&["-netdev", "tap,id=n0,fd=31", "-netdev", "tap,id=n1,fd=hostnet0"]);
        let of = |nic: &Nic| match &nic.kind {
            NicKind::Tap { descriptors, .. } => descriptors.clone(),
            _ => panic!("{nic:?}"),
        };
        assert_eq!([of(&named[0]), of(&named[1])], [vec![31], vec![]]);
    }
}
