//! Numbers formatted for people, and bars.

use std::time::Duration;

use fraiseql_stream::{Stats, Verdict};

/// Formats a number with thousands separators: `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.char_indices() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Formats rows per second: `950 /s`, `9.8 k/s`, `212 k/s`, `1.02 M/s`.
pub(crate) fn rate(rows: u64, time: Duration) -> String {
    let rate = rows as f64 / time.as_secs_f64().max(1e-3);
    match rate {
        ..1e3 => format!("{rate:.0} /s"),
        ..1e5 => format!("{:.1} k/s", rate / 1e3),
        ..1e6 => format!("{:.0} k/s", rate / 1e3),
        _ => format!("{:.2} M/s", rate / 1e6),
    }
}

pub(crate) fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 { format!("{:.0} ms", seconds * 1e3) } else { format!("{seconds:.1} s") }
}

pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{:.0} MB", bytes as f64 / 1e6)
}

pub(crate) fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// Draws a bar of 10 cells; a share of 0.3 is `[###.......]`.
pub(crate) fn bar(share: f64) -> String {
    let filled = round(share * 10.0).min(10);
    format!("[{}{}]", "#".repeat(filled), ".".repeat(10 - filled))
}

/// Draws a bar of exactly `width` letters, each part in proportion to its value.
pub(crate) fn stacked(parts: &[(char, f64)], width: usize) -> String {
    let total: f64 = parts.iter().map(|(_, part)| part).sum();
    let mut bar = String::new();
    let mut sum = 0.0;
    for (letter, part) in parts {
        sum += part;
        let end = round(sum / total.max(f64::MIN_POSITIVE) * width as f64);
        while bar.len() < end {
            bar.push(*letter);
        }
    }
    bar
}

/// Rounds to the nearest whole number.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "all values are small and positive"
)]
fn round(number: f64) -> usize {
    number.round() as usize
}

/// Formats text for the terminal, with or without colours.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint {
    pub(crate) colour: bool,
}

impl Paint {
    pub(crate) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    /// Formats a verdict and its share in 20 columns: `source-bound    72 %`.
    pub(crate) fn verdict(self, stats: &Stats) -> String {
        let verdict = stats.verdict();
        let share = percent(stats.shares().dominant());
        let code = match verdict {
            Verdict::ConsumerBound => "33",
            Verdict::SourceBound => "36",
            Verdict::RuntimeBound => "35",
            _ => "32",
        };
        self.with(code, &format!("{:<14} {share:>5}", verdict.to_string()))
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
