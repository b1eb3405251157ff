//! A small file of JSON below the agent's state directory, replaced as a whole.

use std::fs::File;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// What is on record. What cannot be understood is as if there were nothing, and is put aside.
pub(crate) fn read<T: DeserializeOwned + Default>(file: &Path) -> T {
    let read = std::fs::read(file).and_then(|text| Ok(serde_json::from_slice(&text)?));
    match read {
        Ok(content) => content,
        Err(e) if e.kind() == io::ErrorKind::NotFound => T::default(),
        Err(e) => {
            let aside = file.with_extension("bad");
            tracing::error!(file = %file.display(), error = %e, aside = %aside.display(), "cannot be understood");
            let _ = std::fs::rename(file, aside);
            T::default()
        }
    }
}

/// Puts it on record: after a crash there is this, or what was there before.
pub(crate) fn write<T: Serialize>(file: &Path, content: &T) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(content)?;
    let new = file.with_extension("new");
    std::fs::write(&new, text)?;
    File::open(&new)?.sync_all()?;
    std::fs::rename(&new, file)?;
    file.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}
