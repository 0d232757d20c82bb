//! Numbers formatted for people.

use std::time::Duration;

/// 12345678 as `1.23e7`.
pub(crate) fn scientific(number: f64) -> String {
    format!("{number:.2e}")
}

/// A measurement to three digits: `0.0337`, `12.4`, `207`, `1.80e-4`; `-` for one that is not
/// finite.
pub(crate) fn rounded(value: f64) -> String {
    // The number of digits depends on the rounded value.
    let size = match value.abs() {
        size if !size.is_finite() => return "-".to_owned(),
        size => size * 1.0005,
    };
    match size {
        0.0 => "0".to_owned(),
        size if !(0.001..1e6).contains(&size) => format!("{value:.2e}"),
        size if size < 0.01 => format!("{value:.5}"),
        size if size < 0.1 => format!("{value:.4}"),
        size if size < 1.0 => format!("{value:.3}"),
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// 1234567 as `1.23M`.
pub(crate) fn short(number: usize) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")];
    // A value that rounds up to a thousand belongs to the next unit.
    match units
        .into_iter()
        .find(|(unit, _)| number as f64 >= 0.9995 * unit)
    {
        Some((unit, name)) => {
            let value = number as f64 / unit;
            let digits = if value < 9.995 {
                2
            } else {
                usize::from(value < 99.95)
            };
            format!("{value:.digits$}{name}")
        }
        None => number.to_string(),
    }
}

/// 1234567 as `1,234,567`.
pub(crate) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .filter_map(|group| std::str::from_utf8(group).ok())
        .collect();
    groups.join(",")
}

/// `1h02m`, `3m20s` or `12s`.
pub(crate) fn brief(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds:02}s"),
        (hours, minutes, _) => format!("{hours}h{minutes:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_numbers_have_three_digits() {
        for (value, text) in [
            (0.0, "0"),
            (1.8e-4, "1.80e-4"),
            (0.001_234, "0.00123"),
            (0.033_71, "0.0337"),
            (0.999_9, "1.00"),
            (-3.162_3, "-3.16"),
            (12.41, "12.4"),
            (206.6, "207"),
            (123_456.0, "123456"),
            (1.5e7, "1.50e7"),
            (f64::NAN, "-"),
            (f64::INFINITY, "-"),
        ] {
            assert_eq!(rounded(value), text);
        }
    }

    #[test]
    fn numbers_are_shortened_to_three_digits() {
        let cases = [
            (999, "999"),
            (1000, "1.00K"),
            (927_752, "928K"),
            (999_600, "1.00M"),
            (14_417_920, "14.4M"),
            (118_640_000_000, "119G"),
        ];
        for (number, text) in cases {
            assert_eq!(short(number), text);
        }
    }
}
