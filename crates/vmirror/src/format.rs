//! Numbers as people read them.

use std::time::Duration;

/// A size: `512.0 MiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let unit = (bytes.ilog2() / 10).min(6);
    let scaled = bytes as f64 / f64::from(2_u32.pow(10)).powi(i32::try_from(unit).unwrap_or(6));
    let name = UNITS[usize::try_from(unit).unwrap_or(1).saturating_sub(1)];
    format!("{scaled:.1} {name}")
}

/// A rate: `1.2 GiB/s`. Nothing sensible shows as a dash.
pub(crate) fn rate(per_second: f64) -> String {
    if per_second.is_finite() && per_second >= 0.0 {
        format!("{}/s", bytes(per_second as u64))
    } else {
        "-".to_owned()
    }
}

/// A length of time given in milliseconds: `0.42 ms`, `8.7 ms`, `350 ms`, `1.79 s`, `2m 5s`, `3h 4m`.
pub(crate) fn ms(ms: f64) -> String {
    if !ms.is_finite() || ms < 0.0 {
        return "-".to_owned();
    }
    match ms {
        ms if ms < 0.0005 => "0 ms".to_owned(),
        ms if ms < 1.0 => format!("{ms:.2} ms"),
        ms if ms < 100.0 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms if ms < 59_995.0 => format!("{:.2} s", ms / 1e3),
        ms => {
            let seconds = Duration::from_secs_f64((ms / 1e3).round().min(1e12)).as_secs();
            match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
                (0, minutes, seconds) => format!("{minutes}m {seconds}s"),
                (hours, minutes, _) => format!("{hours}h {minutes}m"),
            }
        }
    }
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

/// A moment, in the local time zone: `2026-11-22 20:57:40`.
pub(crate) fn moment(unix_ms: u64) -> String {
    let at = i64::try_from(unix_ms).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    at.map_or_else(
        || "-".to_owned(),
        |at| at.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
    )
}

/// Enough of an id to name it.
pub(crate) fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_choose_the_unit_that_reads_best() {
        for (size, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (512 << 20, "512.0 MiB"),
            (16 << 30, "16.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(size), text);
        }
        assert_eq!(rate(1.25e9), "1.2 GiB/s");
        assert_eq!(rate(f64::NAN), "-");
    }

    #[test]
    fn times_keep_the_digits_that_matter() {
        for (given, text) in [
            (0.0, "0 ms"),
            (0.421, "0.42 ms"),
            (8.74, "8.7 ms"),
            (350.4, "350 ms"),
            (999.9, "1.00 s"),
            (1790.0, "1.79 s"),
            (125_000.0, "2m 5s"),
            (11_050_000.0, "3h 4m"),
            (-1.0, "-"),
            (f64::INFINITY, "-"),
        ] {
            assert_eq!(ms(given), text, "{given}");
        }
    }

    #[test]
    fn thousands_stand_apart() {
        for (number, text) in
            [(0, "0"), (999, "999"), (1000, "1,000"), (131_072, "131,072"), (1_000_000, "1,000,000")]
        {
            assert_eq!(count(number), text);
        }
    }
}
