//! The map of the repository: files that the documentation names are there, and it names the fuzz targets that there are.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// What follows a backtick and looks like a path of this repository.
fn paths_in(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    let is_path = |word: &&str| {
        let begins = ["crates/", "docs/", "tests/", "testbed/", "bench/", "guest/", "setup/", "fuzz/"];
        begins.iter().any(|begin| word.starts_with(begin))
    };
    quoted.filter(is_path).filter(|path| !path.contains(['*', '{', '…', ' ', '$', '<']))
}

#[test]
fn files_that_the_documentation_names_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let documents = ["README.md", "docs/architecture.md", "docs/protocol.md", "docs/threat-model.md"];
    let mut seen = 0;
    for document in documents {
        // What is fenced is no prose: its backticks are not in pairs.
        let text = fs::read_to_string(root.join(document)).unwrap();
        let prose: Vec<&str> = text.split("\n```").step_by(2).collect();
        for path in paths_in(&prose.join("\n")) {
            assert!(root.join(path).exists(), "{document} names {path}, which is not there");
            seen += 1;
        }
    }
    assert!(seen > 40, "only {seen} were found");
}

#[test]
fn what_is_said_to_be_fuzzed_is_and_nothing_else() {
    let text = include_str!("../../../docs/threat-model.md");
    let table = text.split("| what is fuzzed |").nth(1).expect("a table");
    let rows = table.lines().skip(2).take_while(|line| line.starts_with("| "));
    let names = rows.flat_map(|row| row.split('|').nth(1).unwrap().split(','));
    let told: BTreeSet<String> = names.map(|name| name.trim().trim_matches('`').to_owned()).collect();
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
    let targets = fs::read_dir(crates).unwrap().flat_map(|of| {
        let targets = fs::read_dir(of.unwrap().path().join("fuzz/fuzz_targets"));
        targets.into_iter().flatten().map(|target| target.unwrap().path())
    });
    let there: BTreeSet<String> =
        targets.map(|target| target.file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    assert!(there.len() >= 18, "{there:?}");
    assert_eq!(told, there);
}
