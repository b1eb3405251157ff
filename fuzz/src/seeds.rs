//! What corpora begin with: messages as they really are.

use std::fs;
use std::path::PathBuf;

/// Writes the seeds of one target: `corpus/TARGET/seed-NAME` in the directory of its package.
#[derive(Debug)]
pub struct Seeds(PathBuf);

impl Seeds {
    /// Those of this target. `package` is the `CARGO_MANIFEST_DIR` of the caller.
    ///
    /// # Panics
    /// If the directory cannot be made.
    #[must_use]
    pub fn of(package: &str, target: &str) -> Seeds {
        let directory = PathBuf::from(package).join("corpus").join(target);
        fs::create_dir_all(&directory).expect("the corpus is in the repository");
        Seeds(directory)
    }

    /// One of them.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn add(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.0.join(format!("seed-{name}")), content).expect("the corpus is in the repository");
    }
}
