//! Numbers as people read them.

/// 12345678 as `1.23e7`.
pub(crate) fn scientific(number: f64) -> String {
    format!("{number:.2e}")
}

/// 1234567 as `1.23M`.
pub(crate) fn short(number: usize) -> String {
    let units = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")];
    // What rounds up to a thousand of a unit is one of the next.
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

#[cfg(test)]
mod tests {
    use super::*;

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
