//! Drives: the files that they name, and drivers that read other files than those.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::permissions::Remedy;
use super::renderer::{Outcome, Renderer, Stop};
use crate::argument::Argument;
use crate::known::BlockDriver;
use crate::options::{Properties, is_yes};

/// Keys whose values are texts.
const TEXTS: &[&str] = &["serial", "id", "node-name"];
const FORCE_SHARE: &str = "force-share";

/// The image of an option that is one: `-hda`, `-cdrom`, the word without an option.
pub(super) fn image(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    let name = if argument.is_image() { argument.word() } else { argument.value().unwrap_or_default() };
    file_name(renderer, argument, name)?;
    Ok(vec![argument.clone()])
}

pub(super) fn drive(renderer: &mut Renderer<'_>, argument: &Argument) -> Outcome {
    if argument.name() == "pflash" {
        file_name(renderer, argument, argument.value().unwrap_or_default())?;
        return Ok(vec![argument.clone()]);
    }
    let properties = argument.properties();
    // In the short notation a word alone stands for `on`.
    if properties.keys().iter().any(|key| last_of(key) == FORCE_SHARE && properties.is_on(key)) {
        return ignores_locks(renderer, argument).map(|()| vec![argument.clone()]);
    }
    leaves(renderer, argument, &properties.texts())?;
    Ok(vec![argument.clone()])
}

fn last_of(key: &str) -> &str {
    key.rsplit('.').next().unwrap_or(key)
}

/// What another machine writes meanwhile, it would read: a header that names other files, among others.
fn ignores_locks(renderer: &mut Renderer<'_>, argument: &Argument) -> Result<(), Stop> {
    renderer.unknown(argument, "it does not mind who has its image locked")
}

fn leaves(renderer: &mut Renderer<'_>, argument: &Argument, leaves: &[(String, String)]) -> Result<(), Stop> {
    for (key, text) in leaves {
        let last = last_of(key);
        match last {
            "driver" | "format" => driver(renderer, argument, text)?,
            // In the short notation a name of a protocol, or a whole description, can stand where a file's stands.
            "file" | "filename" => file_name(renderer, argument, text)?,
            // The locks on an image are what keeps two machines from it.
            "locking" if !["on", "auto"].contains(&text.as_str()) => {
                return renderer.unknown(argument, "it takes no lock on its image");
            }
            FORCE_SHARE if is_yes(text) => return ignores_locks(renderer, argument),
            _ if TEXTS.contains(&last) => {}
            _ if text.contains('/') => renderer.may_read(argument, Path::new(text))?,
            _ => {}
        }
    }
    Ok(())
}

fn driver(renderer: &mut Renderer<'_>, argument: &Argument, name: &str) -> Result<(), Stop> {
    if BlockDriver::is_confined(name)
        || renderer.how.permissions.disk_drivers.iter().any(|allowed| allowed == name)
    {
        return Ok(());
    }
    let why = format!("block driver {name} reaches more than the file that it is given");
    renderer.refuse(argument, why, Remedy::DiskDrivers(name.to_owned()))
}

/// A path, a node's name, `PROTOCOL:…` or `json:{…}`.
fn file_name(renderer: &mut Renderer<'_>, argument: &Argument, name: &str) -> Result<(), Stop> {
    if let Some(json) = name.strip_prefix("json:") {
        return match serde_json::from_str::<Value>(json) {
            Ok(Value::Object(object)) => leaves(renderer, argument, &Properties::from_object(object).texts()),
            _ => renderer.unknown(argument, "its JSON cannot be read"),
        };
    }
    let prefix = name.find([':', '/']).filter(|&at| name.as_bytes()[at] == b':').map(|at| &name[..at]);
    let path = match prefix {
        Some("file") => &name["file:".len()..],
        Some("fat") => return driver(renderer, argument, "vvfat"),
        Some(protocol) => return driver(renderer, argument, protocol.split('+').next().unwrap_or(protocol)),
        None => name,
    };
    // Those of the machine's disks are looked at, with more words, by whoever calls this.
    let path = PathBuf::from(path);
    let mut disks = renderer.spec.disks().into_iter().filter_map(|disk| disk.host_path().map(Path::to_owned));
    let mut flash = renderer.spec.files().into_iter().map(|file| file.path);
    if !name.contains('/') || disks.any(|disk| disk == path) || flash.any(|file| file == path) {
        return Ok(());
    }
    renderer.may_read(argument, &path)
}
