//! Documents in files.

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::BenchError;

/// Reads a document; none where there is no such file.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, BenchError> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(BenchError::file(path))?,
    };
    serde_json::from_str(&text).map(Some).map_err(BenchError::document(path.display().to_string()))
}

/// A document as its file is to hold it.
pub fn json(document: &impl Serialize) -> Result<String, BenchError> {
    let text = serde_json::to_string_pretty(document).map_err(BenchError::document("the run"))?;
    Ok(text + "\n")
}

/// Writes a file, and makes its directory if there is none.
pub fn write(path: &Path, text: &str) -> Result<(), BenchError> {
    let directory = path.parent().unwrap_or(path);
    fs::create_dir_all(directory).map_err(BenchError::file(directory))?;
    fs::write(path, text).map_err(BenchError::file(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_there_is_none_and_another_is_refused() {
        let directory = std::env::temp_dir().join(format!("vmirror-bench-file-{}", std::process::id()));
        let path = directory.join("numbers.json");
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), None);
        write(&path, &json(&[1, 2]).unwrap()).unwrap();
        assert_eq!(read(&path).unwrap(), Some(vec![1, 2]));
        write(&path, "{}").unwrap();
        assert!(read::<Vec<u32>>(&path).is_err());
        fs::remove_dir_all(&directory).unwrap();
    }
}
