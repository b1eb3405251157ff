//! What people read of migrations: numbers with their units, and HTML pages.
//!
//! A crate of its own because the command and the benchmark show the same figures, neither uses the other, and no crate that
//! both use shows anything to anybody.

pub mod html;

use bytesize::ByteSize;
use jiff::Timestamp;
use jiff::tz::TimeZone;

/// A size: `512.0 MiB`.
#[must_use]
pub fn bytes(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// A rate: `1.2 GiB/s`. Nothing sensible shows as a dash.
#[must_use]
pub fn rate(per_second: f64) -> String {
    if per_second.is_finite() && per_second >= 0.0 {
        format!("{}/s", bytes(per_second as u64))
    } else {
        "-".to_owned()
    }
}

/// A length of time given in milliseconds: `0.42 ms`, `8.7 ms`, `350 ms`, `1.79 s`, `2m 5s`, `3h 4m`.
#[must_use]
pub fn ms(ms: f64) -> String {
    match ms {
        ..0.0005 if ms >= 0.0 => "0 ms".to_owned(),
        1.0..100.0 => format!("{ms:.1} ms"),
        59_995.0..f64::INFINITY => {
            let seconds = (ms / 1e3).round().min(1e12) as u64;
            match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
                (0, minutes, seconds) => format!("{minutes}m {seconds}s"),
                (hours, minutes, _) => format!("{hours}h {minutes}m"),
            }
        }
        _ => measured_ms(ms),
    }
}

/// The same to three digits, for times that are held against each other: `8.74 ms`, `31.3 ms`, `350 ms`, `1.79 s`, `300.00 s`.
#[must_use]
pub fn measured_ms(ms: f64) -> String {
    match ms {
        ms if !ms.is_finite() || ms < 0.0 => "-".to_owned(),
        ms if ms < 10.0 => format!("{ms:.2} ms"),
        ms if ms < 99.95 => format!("{ms:.1} ms"),
        ms if ms < 999.5 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1e3),
    }
}

/// A number with its thousands apart: `131,072`.
#[must_use]
pub fn count(number: u64) -> String {
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
#[must_use]
pub fn moment(unix_ms: u64) -> String {
    let at = i64::try_from(unix_ms).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
    at.map_or_else(
        || "-".to_owned(),
        |at| at.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
    )
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
            ((1 << 20) - 1, "1024.0 KiB"),
            (1 << 20, "1.0 MiB"),
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
        for (given, text, measured) in [
            (0.0, "0 ms", "0.00 ms"),
            (0.421, "0.42 ms", "0.42 ms"),
            (8.74, "8.7 ms", "8.74 ms"),
            (31.26, "31.3 ms", "31.3 ms"),
            (350.4, "350 ms", "350 ms"),
            (999.9, "1.00 s", "1.00 s"),
            (1790.0, "1.79 s", "1.79 s"),
            (125_000.0, "2m 5s", "125.00 s"),
            (11_050_000.0, "3h 4m", "11050.00 s"),
            (-1.0, "-", "-"),
            (f64::NAN, "-", "-"),
            (f64::INFINITY, "-", "-"),
        ] {
            assert_eq!((ms(given).as_str(), measured_ms(given).as_str()), (text, measured), "{given}");
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
