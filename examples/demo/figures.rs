//! Numbers as people read them, and the bars.

use std::time::Duration;

use fraiseql_stream::{Stats, Verdict};

/// 1234567 is `1,234,567`.
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

/// Rows per second: `950 /s`, `9.8 k/s`, `212 k/s`, `1.02 M/s`.
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

/// `[###.......]`, for a share of 0.3.
pub(crate) fn bar(share: f64) -> String {
    let full = whole(share * 10.0).min(10);
    format!("[{}{}]", "#".repeat(full), ".".repeat(10 - full))
}

/// A bar of exactly `width` letters, as many of each as its share of the whole asks for.
pub(crate) fn stacked(parts: &[(char, f64)], width: usize) -> String {
    let life: f64 = parts.iter().map(|(_, part)| part).sum();
    let mut bar = String::new();
    let mut sum = 0.0;
    for (letter, part) in parts {
        sum += part;
        let end = whole(sum / life.max(f64::MIN_POSITIVE) * width as f64);
        while bar.len() < end {
            bar.push(*letter);
        }
    }
    bar
}

/// The nearest whole number.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "all of them are small and positive"
)]
fn whole(number: f64) -> usize {
    number.round() as usize
}

/// Colours, or none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint {
    pub(crate) colour: bool,
}

impl Paint {
    pub(crate) fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    /// `source-bound    72 %`, 20 wide.
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
