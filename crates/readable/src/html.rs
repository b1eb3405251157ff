//! HTML to look at: no script, and nothing from elsewhere.

use std::fmt::Display;

const STYLE: &str = include_str!("html/style.css");

/// A whole page, of parts that are HTML already.
#[must_use]
pub fn page(title: &str, parts: &[String]) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{}</main>\n</body>\n</html>\n",
        escape(title),
        parts.concat()
    )
}

/// Text that may come from anybody, made harmless in elements and in attributes.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// A part under a title; none without content.
#[must_use]
pub fn section(title: &str, content: &str) -> String {
    if content.is_empty() {
        return String::new();
    }
    format!("<section>\n<h2>{}</h2>\n{content}</section>\n", escape(title))
}

/// One figure, large: what it is, and a note that may be empty.
#[must_use]
pub fn figure(value: impl Display, name: &str, note: &str) -> String {
    let note = if note.is_empty() { String::new() } else { format!("<small>{note}</small>") };
    format!("<div class=\"figure\"><b>{value}</b><span>{name}</span>{note}</div>\n")
}

/// Figures beside each other.
#[must_use]
pub fn figures(all: &str) -> String {
    format!("<div class=\"figures\">\n{all}</div>\n")
}

/// A table of rows under their heads.
#[must_use]
pub fn table(heads: &str, rows: &str) -> String {
    format!(
        "<div class=\"scroll\"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
}

/// A drawing (SVG) in its own units, which the page scales.
#[must_use]
pub fn drawing(width: f64, height: f64, content: &str) -> String {
    format!(
        "<div class=\"scroll\"><svg viewBox=\"0 0 {width} {height}\" role=\"img\">\n{content}</svg></div>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_become_markup() {
        assert_eq!(escape("a&b<c>\"d'"), "a&amp;b&lt;c&gt;&quot;d&#39;");
        let page = page("<script>", &[section("<img>", "content")]);
        assert!(!page.contains("<script") && !page.contains("<img"), "{page}");
    }

    #[test]
    fn nothing_is_loaded_from_elsewhere() {
        for loading in ["url(", "@import", "http"] {
            assert!(!STYLE.contains(loading), "{loading}");
        }
    }

    #[test]
    fn what_is_empty_is_left_out() {
        assert_eq!(section("Nothing", ""), "");
        assert!(!figure(1, "one", "").contains("<small>"));
    }
}
