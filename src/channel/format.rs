//! Text for people: numbers with units, and strings that stay on one line.

use std::fmt;
use std::time::Duration;

/// A writer that escapes line breaks and control characters. It does not escape backslashes, so that a name already
/// quoted by `{:?}` is not escaped twice.
pub(crate) struct OneLine<'a, 'f>(pub(crate) &'a mut fmt::Formatter<'f>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for part in text.split_inclusive(must_be_escaped) {
            match part.char_indices().next_back() {
                Some((at, last)) if must_be_escaped(last) => {
                    write!(self.0, "{}{}", &part[..at], last.escape_debug())?;
                }
                _ => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}

/// Returns whether `c` is a control character or one of Unicode's other line breaks.
fn must_be_escaped(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}')
}

/// A count with its digits in groups of three: `100,213`.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (i, digit) in digits.char_indices() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                f.write_str(",")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

/// A number of rows: `1 row`, `1,234 rows`.
pub(super) struct Rows(pub(super) u64);

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} row{}", Grouped(self.0), if self.0 == 1 { "" } else { "s" })
    }
}

/// A number of bytes with a decimal unit: `61.0 MB`.
pub(super) struct Bytes(pub(super) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amount = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} B", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", amount / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", amount / 1e6),
            _ => write!(f, "{:.1} GB", amount / 1e9),
        }
    }
}

/// A duration in milliseconds below one second, and in seconds above: `12.4 s`.
pub(super) struct Seconds(pub(super) Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        if seconds < 1.0 { write!(f, "{:.0} ms", seconds * 1e3) } else { write!(f, "{seconds:.1} s") }
    }
}

/// A share of 1 in percent: `81 %`.
pub(super) struct Percent(pub(super) f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.0} %", self.0 * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_units_and_grouped_digits() {
        assert_eq!(Grouped(7).to_string(), "7");
        assert_eq!(Grouped(100_213).to_string(), "100,213");
        assert_eq!(Rows(1).to_string(), "1 row");
        assert_eq!(Bytes(61_000_000).to_string(), "61.0 MB");
        assert_eq!(Seconds(Duration::from_millis(12_400)).to_string(), "12.4 s");
    }
}
