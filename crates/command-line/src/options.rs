//! The value of one QEMU option as properties: `key=value,…` or JSON.
//!
//! QEMU reads most option values in one of two notations. In `driver,key=value,flag,nokey` a comma inside a value
//! is doubled and the first word without `=` stands for a key that depends on the option (`-device e1000` means
//! `driver=e1000`). In the other, the value is a JSON object. Both are read and written here without losing
//! anything: what was not changed is rendered as it was, in its place.

use serde_json::{Map, Value};

/// Properties of one option value, in the notation in which the user wrote them.
#[derive(Debug, Clone, PartialEq)]
pub struct Properties {
    notation: Notation,
    /// The key that a first word without `=` stands for.
    implied: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq)]
enum Notation {
    Pairs(Vec<Pair>),
    Json(Map<String, Value>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Pair {
    /// `key=value`
    Named(String, String),
    /// A word without `=`: the value of the implied key if it is the first, else `flag` or `noflag`.
    Bare(String),
}

impl Properties {
    /// Reads `text`. Only a text that begins with `{` can fail.
    ///
    /// # Errors
    /// Says what is wrong with the JSON.
    pub fn parse(text: &str, implied: Option<&'static str>) -> Result<Properties, serde_json::Error> {
        let notation = if text.starts_with('{') {
            Notation::Json(serde_json::from_str(text)?)
        } else {
            Notation::Pairs(parse_pairs(text))
        };
        Ok(Properties { notation, implied })
    }

    /// Reads `text` as `key=value` notation whatever it begins with, for options that know no JSON.
    #[must_use]
    pub fn parse_pairs(text: &str, implied: Option<&'static str>) -> Properties {
        Properties { notation: Notation::Pairs(parse_pairs(text)), implied }
    }

    /// Properties in `key=value` notation that begin with the value of the implied key.
    #[must_use]
    pub fn new(implied: &'static str, value: &str) -> Properties {
        Properties { notation: Notation::Pairs(vec![Pair::Bare(value.to_owned())]), implied: Some(implied) }
    }

    /// The JSON object, if that is the notation.
    #[must_use]
    pub fn json(&self) -> Option<&Map<String, Value>> {
        match &self.notation {
            Notation::Json(object) => Some(object),
            Notation::Pairs(_) => None,
        }
    }

    /// The value of `key` as text; of several the last, as QEMU does. Booleans read as `on` and `off`, in both
    /// notations. A key with dots also finds the member of a nested object.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<String> {
        match &self.notation {
            Notation::Pairs(pairs) => {
                pairs.iter().enumerate().rev().find_map(|(position, pair)| match pair {
                    Pair::Named(name, value) => (name == key).then(|| value.clone()),
                    Pair::Bare(word) if self.is_implied_value(position) => {
                        (self.implied == Some(key)).then(|| word.clone())
                    }
                    Pair::Bare(word) if word == key => Some("on".to_owned()),
                    Pair::Bare(word) => (word.strip_prefix("no") == Some(key)).then(|| "off".to_owned()),
                })
            }
            Notation::Json(object) => member(object, key).and_then(as_text),
        }
    }

    /// Whether `key` is there and says yes.
    #[must_use]
    pub fn is_on(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| is_yes(&value))
    }

    /// The keys present, in order; those of nested objects with dots.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        match &self.notation {
            Notation::Pairs(pairs) => pairs
                .iter()
                .enumerate()
                .map(|(position, pair)| match pair {
                    Pair::Named(name, _) => name.clone(),
                    Pair::Bare(word) if self.is_implied_value(position) => {
                        self.implied.map_or_else(|| word.clone(), str::to_owned)
                    }
                    Pair::Bare(word) => word.clone(),
                })
                .collect(),
            Notation::Json(object) => {
                let mut keys = Vec::new();
                collect_keys(object, "", &mut keys);
                keys
            }
        }
    }

    /// Every value with its key, those of a key that is there more than once all, in order; of nested objects and lists, the keys with
    /// dots. Flags, which have no value, are not among them.
    #[must_use]
    pub fn texts(&self) -> Vec<(String, String)> {
        match &self.notation {
            Notation::Pairs(pairs) => pairs
                .iter()
                .enumerate()
                .filter_map(|(position, pair)| match pair {
                    Pair::Named(name, value) => Some((name.clone(), value.clone())),
                    Pair::Bare(word) if self.is_implied_value(position) => {
                        Some((self.implied?.to_owned(), word.clone()))
                    }
                    Pair::Bare(_) => None,
                })
                .collect(),
            Notation::Json(object) => {
                let mut texts = Vec::new();
                object.iter().for_each(|(key, value)| collect_texts(value, key.clone(), &mut texts));
                texts
            }
        }
    }

    /// The properties of a JSON object.
    #[must_use]
    pub(crate) fn from_object(object: Map<String, Value>) -> Properties {
        Properties { notation: Notation::Json(object), implied: None }
    }

    /// Gives `key` a text value, in its place if it is there already.
    pub fn set(&mut self, key: &str, value: &str) {
        self.put(key, value, Value::String(value.to_owned()));
    }

    /// Gives `key` a boolean value: `on`/`off`, or true/false in JSON.
    pub fn set_bool(&mut self, key: &str, value: bool) {
        self.put(key, if value { "on" } else { "off" }, Value::Bool(value));
    }

    /// Gives `key` a number.
    pub fn set_number(&mut self, key: &str, value: u64) {
        self.put(key, &value.to_string(), Value::from(value));
    }

    fn put(&mut self, key: &str, text: &str, json: Value) {
        let implied = self.implied;
        match &mut self.notation {
            Notation::Pairs(pairs) => {
                let is_bare_value = |position: usize| position == 0 && implied.is_some();
                let position = pairs.iter().enumerate().rposition(|(position, pair)| match pair {
                    Pair::Named(name, _) => name == key,
                    Pair::Bare(_) if is_bare_value(position) => implied == Some(key),
                    Pair::Bare(word) => word == key || word.strip_prefix("no") == Some(key),
                });
                match position {
                    Some(0) if matches!(pairs[0], Pair::Bare(_)) && is_bare_value(0) => {
                        pairs[0] = Pair::Bare(text.to_owned());
                    }
                    Some(position) => pairs[position] = Pair::Named(key.to_owned(), text.to_owned()),
                    None => {
                        // A comma at the very end would run into the one that is about to follow.
                        while pairs.last() == Some(&Pair::Bare(String::new())) {
                            pairs.pop();
                        }
                        pairs.push(Pair::Named(key.to_owned(), text.to_owned()));
                    }
                }
            }
            Notation::Json(object) => put_member(object, key, json),
        }
    }

    /// Takes `key` out, however often it is there. Whether it was.
    pub fn remove(&mut self, key: &str) -> bool {
        let implied = self.implied;
        match &mut self.notation {
            Notation::Pairs(pairs) => {
                let before = pairs.len();
                let mut position = 0;
                pairs.retain(|pair| {
                    let first = position == 0;
                    position += 1;
                    match pair {
                        Pair::Named(name, _) => name != key,
                        Pair::Bare(_) if first && implied.is_some() => implied != Some(key),
                        Pair::Bare(word) => word != key && word.strip_prefix("no") != Some(key),
                    }
                });
                pairs.len() != before
            }
            Notation::Json(object) => remove_member(object, key),
        }
    }

    /// The text for a command line.
    #[must_use]
    pub fn render(&self) -> String {
        match &self.notation {
            Notation::Pairs(pairs) => pairs
                .iter()
                .map(|pair| match pair {
                    Pair::Named(name, value) => format!("{name}={}", escape(value)),
                    Pair::Bare(word) => escape(word),
                })
                .collect::<Vec<_>>()
                .join(","),
            Notation::Json(object) => Value::Object(object.clone()).to_string(),
        }
    }

    fn is_implied_value(&self, position: usize) -> bool {
        position == 0 && self.implied.is_some()
    }
}

/// Whether QEMU reads `text` as yes.
#[must_use]
pub(crate) fn is_yes(text: &str) -> bool {
    matches!(text, "on" | "yes" | "true" | "y")
}

/// Doubles the commas of a value, as QEMU's `key=value` notation wants it.
#[must_use]
pub fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn parse_pairs(text: &str) -> Vec<Pair> {
    let mut pairs = Vec::new();
    let mut rest = text;
    let mut more = !text.is_empty();
    while more {
        let named = rest.find(['=', ',']).filter(|&at| rest.as_bytes()[at] == b'=');
        let (key, after_key) = match named {
            Some(at) => (Some(&rest[..at]), &rest[at + 1..]),
            None => (None, rest),
        };
        let (value, after) = take_value(after_key);
        pairs.push(match key {
            Some(key) => Pair::Named(key.to_owned(), value),
            None => Pair::Bare(value),
        });
        more = after.is_some();
        rest = after.unwrap_or("");
    }
    pairs
}

/// A value up to the next single comma, and what follows that comma if there is one.
fn take_value(text: &str) -> (String, Option<&str>) {
    let mut value = String::new();
    let mut rest = text;
    while let Some(comma) = rest.find(',') {
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, Some(rest)),
        }
    }
    value.push_str(rest);
    (value, None)
}

pub(crate) fn member<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    if let Some(value) = object.get(key) {
        return Some(value);
    }
    let (first, rest) = key.split_once('.')?;
    member(object.get(first)?.as_object()?, rest)
}

pub(crate) fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(yes) => Some(if *yes { "on" } else { "off" }.to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn put_member(object: &mut Map<String, Value>, key: &str, value: Value) {
    if !object.contains_key(key)
        && let Some((first, rest)) = key.split_once('.')
        && let Some(Value::Object(inner)) = object.get_mut(first)
    {
        put_member(inner, rest, value);
        return;
    }
    object.insert(key.to_owned(), value);
}

fn remove_member(object: &mut Map<String, Value>, key: &str) -> bool {
    if object.remove(key).is_some() {
        return true;
    }
    match key.split_once('.') {
        Some((first, rest)) => object
            .get_mut(first)
            .and_then(Value::as_object_mut)
            .is_some_and(|inner| remove_member(inner, rest)),
        None => false,
    }
}

fn collect_keys(object: &Map<String, Value>, prefix: &str, keys: &mut Vec<String>) {
    for (key, value) in object {
        match value {
            Value::Object(inner) => collect_keys(inner, &format!("{prefix}{key}."), keys),
            _ => keys.push(format!("{prefix}{key}")),
        }
    }
}

fn collect_texts(value: &Value, key: String, texts: &mut Vec<(String, String)>) {
    match value {
        Value::Object(inner) => {
            inner.iter().for_each(|(name, value)| collect_texts(value, format!("{key}.{name}"), texts));
        }
        Value::Array(items) => {
            items
                .iter()
                .enumerate()
                .for_each(|(at, value)| collect_texts(value, format!("{key}.{at}"), texts));
        }
        leaf => texts.extend(as_text(leaf).map(|text| (key, text))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pairs(text: &str) -> Properties {
        Properties::parse(text, Some("driver")).unwrap()
    }

    #[test]
    fn reads_implied_key_flags_and_doubled_commas() {
        let properties = pairs("socket,id=a,path=/tmp/x,,y,server,nowait");
        assert_eq!(properties.get("driver").as_deref(), Some("socket"));
        assert_eq!(properties.get("path").as_deref(), Some("/tmp/x,y"));
        assert!(properties.is_on("server"));
        assert_eq!(properties.get("wait").as_deref(), Some("off"));
        assert_eq!(properties.get("missing"), None);
    }

    #[test]
    fn the_last_of_several_values_counts() {
        assert_eq!(pairs("x,a=1,a=2").get("a").as_deref(), Some("2"));
    }

    #[test]
    fn a_changed_value_stays_in_its_place() {
        let mut properties = pairs("file,path=/a,,b,mux=on");
        properties.set("path", "/c,d");
        properties.set("driver", "socket");
        properties.set_bool("append", true);
        assert_eq!(properties.render(), "socket,path=/c,,d,mux=on,append=on");
        assert!(properties.remove("mux"));
        assert!(!properties.remove("mux"));
        assert_eq!(properties.render(), "socket,path=/c,,d,append=on");
    }

    #[test]
    fn json_is_read_and_changed_by_dotted_keys() {
        let mut properties = pairs(r#"{"driver":"raw","cache":{"direct":true},"size":512}"#);
        assert!(properties.is_on("cache.direct"));
        assert_eq!(properties.get("size").as_deref(), Some("512"));
        properties.set_bool("cache.direct", false);
        properties.set("file.filename", "/x");
        assert!(!properties.is_on("cache.direct"));
        assert_eq!(properties.get("file.filename").as_deref(), Some("/x"));
        assert_eq!(properties.keys(), ["cache.direct", "driver", "file.filename", "size"]);
    }

    proptest! {
        #[test]
        fn rendering_gives_the_same_text_back(text in "[a-z=,.{}/ -]{0,60}") {
            prop_assume!(!text.starts_with('{'));
            prop_assert_eq!(pairs(&text).render(), text);
        }

        #[test]
        fn any_value_survives_being_set(before in "[a-z=,]{0,12}", key in "[a-z]{1,8}", value in "\\PC{0,30}") {
            prop_assume!(key != "driver");
            let mut properties = pairs(&format!("x,{before}"));
            properties.set(&key, &value);
            prop_assert_eq!(pairs(&properties.render()).get(&key), Some(value));
        }
    }
}
