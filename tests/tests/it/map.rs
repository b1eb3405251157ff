//! The map of the repository: files that the documentation names are there.

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
