//! Times as people write them.

use std::time::Duration;

/// A time as `1d12h`, `3h50m` or `90s`: whole numbers of days, hours, minutes and seconds, in this
/// order.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a time such as 3h50m, 90m or 45s".to_owned();
    let (mut rest, mut seconds, mut last) = (text, 0_u64, u64::MAX);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..end].parse().map_err(|_| wrong())?;
        let unit = match rest.as_bytes()[end] {
            b'd' => 86_400,
            b'h' => 3_600,
            b'm' => 60,
            b's' => 1,
            _ => return Err(wrong()),
        };
        if unit >= last {
            return Err(wrong());
        }
        let more = number
            .checked_mul(unit)
            .and_then(|more| seconds.checked_add(more));
        (seconds, last, rest) = (more.ok_or_else(wrong)?, unit, &rest[end + 1..]);
    }
    match seconds {
        0 => Err(wrong()),
        seconds => Ok(Duration::from_secs(seconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_a_queue_takes() {
        let seconds = |text| duration(text).map(|found| found.as_secs());
        for (text, expected) in [
            ("3h50m", 13_800),
            ("90m", 5400),
            ("1d12h", 129_600),
            ("1d2h3m4s", 93_784),
        ] {
            assert_eq!(seconds(text), Ok(expected), "{text}");
        }
        for wrong in [
            "",
            "3",
            "h",
            "0s",
            "3m2h",
            "1h1h",
            "-1h",
            "1.5h",
            "3 h",
            "9999999999999999999d",
            "1\u{b5}",
        ] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
