//! Numbers as people read them.

/// A time in milliseconds: `0.42 ms`, `8.7 ms`, `350 ms`, `1.79 s`.
pub(crate) fn ms(ms: f64) -> String {
    match ms {
        ms if !ms.is_finite() || ms < 0.0 => "-".to_owned(),
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 99.95 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1e3),
    }
}

/// A size in bytes: `512.0 MiB`.
pub(crate) fn bytes(bytes: f64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut scaled = bytes / 1024.0;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if scaled < 1024.0 {
            break;
        }
        (scaled, unit) = (scaled / 1024.0, next);
    }
    format!("{scaled:.1} {unit}")
}

/// A number with its thousands apart: `131,072`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_the_digits_that_matter() {
        for (given, text) in [
            (0.421, "0.42 ms"),
            (8.74, "8.74 ms"),
            (31.26, "31.3 ms"),
            (350.4, "350 ms"),
            (999.9, "1.00 s"),
            (f64::NAN, "-"),
        ] {
            assert_eq!(ms(given), text);
        }
        assert_eq!((bytes(512.0), bytes((512 << 20) as f64)), ("0.5 KiB".into(), "512.0 MiB".into()));
        assert_eq!(
            (count(7), count(131_072), count(1_000_000)),
            ("7".into(), "131,072".into(), "1,000,000".into())
        );
    }
}
