//! The user that a QEMU runs as which is started for somebody else.

use std::{fmt, fs, io, os::unix::fs::MetadataExt, path::Path, str::FromStr};

use rustix::fs::{AtFlags, CWD, chownat};
use rustix::process::{Gid, Uid};
use serde::{Deserialize, Serialize};

/// A user of this host, with the groups that it is in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct User {
    name: String,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

/// A text that names no user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no user in /etc/passwd; others are given as numbers, \"UID:GID\"")]
pub struct NoUser(pub String);

impl FromStr for User {
    type Err = NoUser;

    /// A name in `/etc/passwd`, with its groups in `/etc/group`; or `UID:GID`, with no other groups.
    fn from_str(text: &str) -> Result<User, NoUser> {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        parse(text, &read("/etc/passwd"), &read("/etc/group"))
    }
}

impl TryFrom<String> for User {
    type Error = NoUser;

    fn try_from(text: String) -> Result<User, NoUser> {
        text.parse()
    }
}

impl From<User> for String {
    fn from(user: User) -> String {
        user.name
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn parse(text: &str, passwd: &str, group: &str) -> Result<User, NoUser> {
    let wrong = || NoUser(text.to_owned());
    if let Some((uid, gid)) = text.split_once(':') {
        let number = |text: &str| text.parse().map_err(|_| wrong());
        return Ok(User { name: text.to_owned(), uid: number(uid)?, gid: number(gid)?, groups: Vec::new() });
    }
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let entry =
        passwd.lines().map(fields).find(|fields| fields.len() >= 4 && fields[0] == text && !text.is_empty());
    let entry = entry.ok_or_else(wrong)?;
    let (uid, gid) = (entry[2].parse().map_err(|_| wrong())?, entry[3].parse().map_err(|_| wrong())?);
    let member = |fields: &Vec<String>| fields.len() >= 4 && fields[3].split(',').any(|name| name == text);
    let groups = group.lines().map(fields).filter(member).filter_map(|fields| fields[2].parse().ok());
    Ok(User { name: text.to_owned(), uid, gid, groups: groups.filter(|group| *group != gid).collect() })
}

impl User {
    /// The user and the group that a process runs as.
    ///
    /// # Errors
    /// Where /proc does not tell.
    pub fn of_process(pid: u32) -> io::Result<User> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        // Real, effective, saved, and that for files.
        let effective = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|line| line.split_whitespace().nth(1)).and_then(|number| number.parse().ok())
        };
        let told = effective("Uid:").zip(effective("Gid:"));
        let (uid, gid): (u32, u32) = told.ok_or(io::ErrorKind::InvalidData)?;
        Ok(User { name: format!("{uid}:{gid}"), uid, gid, groups: Vec::new() })
    }

    /// Its number.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Whether it is the one that this process runs as.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.uid == rustix::process::geteuid().as_raw()
    }

    /// Makes a file its own. A link is not followed.
    ///
    /// # Errors
    /// Those of `chown(2)`.
    pub fn give(&self, path: &Path) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        Ok(chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Whether it can open a file, and write it; of one that is not there, make it. By modes alone: what a list of access control says
    /// is not looked at, and then it is QEMU that complains.
    #[must_use]
    pub fn may_open(&self, path: &Path, write: bool) -> bool {
        let wanted = if write { 0o6 } else { 0o4 };
        let Ok(real) = fs::canonicalize(path) else {
            return path.parent().is_some_and(|directory| self.may(directory, 0o3)) && self.may_reach(path);
        };
        self.may(&real, wanted) && self.may_reach(&real)
    }

    /// Whether it can go through every directory above a file, which need not be there.
    #[must_use]
    pub fn may_reach(&self, path: &Path) -> bool {
        let directory = path.parent().and_then(|directory| fs::canonicalize(directory).ok());
        directory.is_some_and(|directory| directory.ancestors().all(|directory| self.may(directory, 0o1)))
    }

    fn may(&self, path: &Path, wanted: u32) -> bool {
        let Ok(file) = fs::metadata(path) else { return false };
        let shift = if file.uid() == self.uid {
            6
        } else if file.gid() == self.gid || self.groups.contains(&file.gid()) {
            3
        } else {
            0
        };
        self.uid == 0 || file.mode() >> shift & wanted == wanted
    }

    /// Has the caller become the user for good: to be called in a child between fork and exec, where there is one thread. Nothing is
    /// allocated then.
    pub(crate) fn to_become(&self) -> impl Fn() -> io::Result<()> + Send + Sync + 'static {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let groups: Vec<Gid> = self.groups.iter().copied().map(Gid::from_raw).collect();
        move || {
            rustix::thread::set_thread_groups(&groups)?;
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nqemu:x:107:108:QEMU:/:/usr/sbin/nologin\nshort:x\n";
    const GROUP: &str = "kvm:x:36:qemu,other\nqemu:x:108:qemu\ndisk:x:6:qemux\n";

    #[test]
    fn a_user_has_the_groups_that_it_is_in() {
        let qemu = parse("qemu", PASSWD, GROUP).unwrap();
        assert_eq!((qemu.uid, qemu.gid, qemu.groups.as_slice()), (107, 108, [36].as_slice()));
        let numbers = parse("64055:64056", PASSWD, GROUP).unwrap();
        assert_eq!((numbers.uid, numbers.gid, numbers.groups.len()), (64055, 64056, 0));
        assert_eq!(String::from(numbers), "64055:64056");
        for wrong in ["", "short", "nobody", "1:", ":1", "-1:1", "1:1:1"] {
            assert_eq!(parse(wrong, PASSWD, GROUP), Err(NoUser(wrong.to_owned())));
        }
    }

    #[test]
    fn what_a_user_can_open_goes_by_every_directory_above() {
        use std::os::unix::fs::PermissionsExt as _;
        let place = tempfile::tempdir().unwrap();
        let (directory, file) = (place.path().join("d"), place.path().join("d/f"));
        fs::create_dir(&directory).unwrap();
        fs::write(&file, "").unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let other = parse("4000000:4000000", "", "").unwrap();
        let can = || (other.may_open(&file, false), other.may_open(&file, true));
        mode(place.path(), 0o755);
        mode(&directory, 0o755);
        mode(&file, 0o644);
        assert_eq!(can(), (true, false));
        mode(&file, 0o666);
        assert_eq!(can(), (true, true));
        assert!(!other.may_open(&directory.join("new"), true));
        mode(&directory, 0o757);
        assert!(other.may_open(&directory.join("new"), true));
        mode(place.path(), 0o700);
        assert_eq!(can(), (false, false));
        let ours = User::of_process(std::process::id()).unwrap();
        assert!(ours.is_ours() && ours.may_open(&file, true));
    }
}
