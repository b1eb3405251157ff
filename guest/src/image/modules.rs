//! Which kernel modules a module needs, read from the modules themselves.
//!
//! A package that is only unpacked has no `modules.dep` (installing it would make one), but every module names what it depends
//! on in its `.modinfo` section, as `depends=a,b`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// All modules of one kernel, by name.
#[derive(Debug)]
pub struct Modules(BTreeMap<String, PathBuf>);

/// A module that could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModuleError {
    /// No file of that name.
    #[error("module {0} is not in the kernel package")]
    Missing(String),
    /// The file says nothing about what it depends on.
    #[error("{0}: not a kernel module")]
    NoModule(PathBuf),
    /// The file could not be read.
    #[error("{path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Modules {
    /// Finds all modules below that directory.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn find(directory: &Path) -> Result<Self, ModuleError> {
        let mut modules = BTreeMap::new();
        let mut directories = vec![directory.to_owned()];
        while let Some(directory) = directories.pop() {
            let failed = |source| ModuleError::File { path: directory.clone(), source };
            for entry in fs::read_dir(&directory).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                if entry.file_type().map_err(failed)?.is_dir() {
                    directories.push(entry.path());
                } else if let Some(name) = entry.file_name().to_str().and_then(module_name) {
                    modules.insert(name, entry.path());
                }
            }
        }
        Ok(Self(modules))
    }

    /// The wanted modules and all they need: name, direct needs, file; ordered by name.
    ///
    /// Where a wanted module is not there, it is taken for built into the kernel; where a needed one is not, that is an error.
    ///
    /// # Errors
    /// Where a needed module is missing or cannot be read.
    pub fn closure(&self, wanted: &[&str]) -> Result<Vec<(String, Vec<String>, PathBuf)>, ModuleError> {
        let mut open: Vec<String> =
            wanted.iter().map(|name| (*name).to_owned()).filter(|name| self.0.contains_key(name)).collect();
        let mut seen = BTreeSet::new();
        let mut closure = Vec::new();
        while let Some(name) = open.pop() {
            if !seen.insert(name.clone()) {
                continue;
            }
            let path = self.0.get(&name).ok_or_else(|| ModuleError::Missing(name.clone()))?;
            let needs = needs(&read_module(path)?).ok_or_else(|| ModuleError::NoModule(path.clone()))?;
            open.extend(needs.iter().cloned());
            closure.push((name, needs, path.clone()));
        }
        closure.sort();
        Ok(closure)
    }
}

/// A module's bytes, decompressed where the distribution ships it compressed.
///
/// # Errors
/// Where it cannot be read, or `xz` is missing or fails.
pub(super) fn read_module(path: &Path) -> Result<Vec<u8>, ModuleError> {
    let failed = |source| ModuleError::File { path: path.to_owned(), source };
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).map_err(failed);
    }
    let output = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output().map_err(failed)?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(failed(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned())))
    }
}

/// `virtio-rng.ko.xz` is module `virtio_rng`.
fn module_name(file: &str) -> Option<String> {
    let stem = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(stem.replace('-', "_"))
}

fn needs(module: &[u8]) -> Option<Vec<String>> {
    let key = b"\0depends=";
    let start = module.windows(key.len()).position(|window| window == key)? + key.len();
    let end = start + module[start..].iter().position(|byte| *byte == 0)?;
    let names = std::str::from_utf8(&module[start..end]).ok()?;
    Some(names.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

/// Which module needs which, as the init reads it: one line per module, `name: need need`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dependencies(BTreeMap<String, Vec<String>>);

impl Dependencies {
    /// Adds a module and its direct needs.
    pub fn insert(&mut self, name: String, needs: Vec<String>) {
        self.0.insert(name, needs);
    }

    /// Reads the text form; lines that are none are passed over.
    pub fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let (name, needs) = line.split_once(':')?;
            Some((name.to_owned(), needs.split_ascii_whitespace().map(str::to_owned).collect()))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// The modules to load for `name`, in order, itself last. Empty where it is not known: built into the kernel, that is.
    pub fn load_order(&self, name: &str) -> Vec<&str> {
        let mut order = Vec::new();
        self.visit(name, &mut order);
        order
    }

    fn visit<'a>(&'a self, name: &str, order: &mut Vec<&'a str>) {
        let Some((name, needs)) = self.0.get_key_value(name) else { return };
        for need in needs {
            self.visit(need, order);
        }
        if !order.contains(&name.as_str()) {
            order.push(name);
        }
    }
}

impl fmt::Display for Dependencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, needs)| writeln!(f, "{name}: {}", needs.join(" ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let nested = directory.path().join("kernel/drivers");
        fs::create_dir_all(&nested).unwrap();
        for (file, depends) in [
            ("virtio_net.ko", "net_failover,virtio"),
            ("net-failover.ko", "failover"),
            ("failover.ko", ""),
            ("virtio.ko", ""),
        ] {
            fs::write(nested.join(file), format!("ELF\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
        }
        fs::write(nested.join("broken.ko"), "nothing").unwrap();
        directory
    }

    #[test]
    fn needs_are_followed_to_the_end() {
        let directory = kernel();
        let closure = Modules::find(directory.path()).unwrap().closure(&["virtio_net", "built_in"]).unwrap();
        let names: Vec<_> = closure.iter().map(|(name, _, _)| name.as_str()).collect();
        assert_eq!(names, ["failover", "net_failover", "virtio", "virtio_net"]);
    }

    #[test]
    fn a_file_that_is_no_module_is_named() {
        let directory = kernel();
        let error = Modules::find(directory.path()).unwrap().closure(&["broken"]).unwrap_err();
        assert!(matches!(error, ModuleError::NoModule(path) if path.ends_with("broken.ko")));
    }

    #[test]
    fn modules_load_after_what_they_need_and_once() {
        let text = "failover: \nnet_failover: failover\nvirtio: \nvirtio_net: net_failover virtio failover\n";
        let dependencies = Dependencies::parse(text);
        assert_eq!(
            dependencies.load_order("virtio_net"),
            ["failover", "net_failover", "virtio", "virtio_net"]
        );
        assert!(dependencies.load_order("built_in").is_empty());
        assert_eq!(dependencies.to_string(), text);
    }
}
