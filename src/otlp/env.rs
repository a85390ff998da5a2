//! Reads single `OTEL_*` variables as the specification asks: an empty value counts as unset, and an invalid one is
//! replaced by the default with a warning.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use percent_encoding::percent_decode_str;

/// Returns the value of the variable with this name.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// The duration for "no limit": the specification allows a very long one.
pub(super) const NO_LIMIT: Duration = Duration::from_millis(u32::MAX as u64);

/// Variables, and the warnings about those read so far.
pub(super) struct Variables<'a> {
    lookup: Lookup<'a>,
    warnings: Vec<String>,
}

impl<'a> Variables<'a> {
    pub(super) fn new(lookup: Lookup<'a>) -> Self {
        Self { lookup, warnings: Vec::new() }
    }

    pub(super) fn into_warnings(self) -> Vec<String> {
        self.warnings
    }

    pub(super) fn get(&self, name: &str) -> Option<String> {
        (self.lookup)(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    /// Returns the signal's own variable of the exporter if it is set, else the general one.
    pub(super) fn own_or_general(&self, signal: &str, what: &str) -> Option<(String, String)> {
        let names = [format!("OTEL_EXPORTER_OTLP_{signal}_{what}"), format!("OTEL_EXPORTER_OTLP_{what}")];
        names.into_iter().find_map(|name| self.get(&name).map(|value| (name, value)))
    }

    /// Warns that a value is invalid and what is used instead of it.
    pub(super) fn refuse(&mut self, (name, value): (&str, &str), expected: &str, used: impl Display) {
        self.warn(format!("{name}={value:?} is invalid (expected {expected}); using {used}"));
    }

    pub(super) fn warn(&mut self, warning: String) {
        // All three signals read the same general variable.
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }

    /// Reads a boolean. Anything but `true` is false.
    pub(super) fn flag(&mut self, name: &str) -> bool {
        let Some(value) = self.get(name) else {
            return false;
        };
        if !value.eq_ignore_ascii_case("true") && !value.eq_ignore_ascii_case("false") {
            self.refuse((name, &value), "true or false", "false");
        }
        value.eq_ignore_ascii_case("true")
    }

    /// Reads a number above 0.
    pub(super) fn positive<N>(&mut self, name: &str, default: N) -> N
    where
        N: FromStr + PartialOrd + From<u8> + Display + Copy,
    {
        self.parsed(name, "a whole number above 0", (default, |number| *number > N::from(0)))
    }

    /// Reads a number that may be 0.
    pub(super) fn whole<N: FromStr + Display + Copy>(&mut self, name: &str, default: N) -> N {
        self.parsed(name, "a whole number", (default, |_| true))
    }

    /// Reads a number of milliseconds after which something is given up; 0 means never.
    pub(super) fn timeout(&mut self, name: &str, default: u64) -> Duration {
        match self.whole(name, default) {
            0 => NO_LIMIT,
            millis => Duration::from_millis(millis).min(NO_LIMIT),
        }
    }

    /// Reads a ratio from 0 to 1.
    pub(super) fn ratio(&mut self, name: &str) -> f64 {
        self.parsed(name, "a ratio from 0 to 1", (1.0, |ratio| (0.0..=1.0).contains(ratio)))
    }

    fn parsed<N>(&mut self, name: &str, expected: &str, (default, is_valid): (N, fn(&N) -> bool)) -> N
    where
        N: FromStr + Display + Copy,
    {
        let Some(value) = self.get(name) else {
            return default;
        };
        value.parse().ok().filter(is_valid).unwrap_or_else(|| {
            self.refuse((name, &value), expected, default);
            default
        })
    }

    /// Reads one of these names, whose case does not matter. The first one is the default.
    pub(super) fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)]) -> T {
        let (default, fallback) = choices[0];
        let Some(value) = self.get(name) else {
            return fallback;
        };
        let chosen = choices.iter().find(|(choice, _)| choice.eq_ignore_ascii_case(&value));
        chosen.map_or_else(
            || {
                let names: Vec<_> = choices.iter().map(|(choice, _)| *choice).collect();
                self.refuse((name, &value), &names.join(" or "), default);
                fallback
            },
            |(_, chosen)| *chosen,
        )
    }
}

/// Decodes percent-encoding; returns `None` where it is invalid.
pub(super) fn decode(text: &str) -> Option<String> {
    // The decoder leaves a `%` that no two digits follow as it is; the specification wants the value refused.
    let is_code = |rest: &str| rest.get(..2).is_some_and(|code| code.bytes().all(|b| b.is_ascii_hexdigit()));
    let decoded = || percent_decode_str(text).decode_utf8().ok().map(Into::into);
    text.split('%').skip(1).all(is_code).then(decoded).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_percent_encoding_is_not_decoded() {
        assert_eq!(decode("a%2Cb").as_deref(), Some("a,b"));
        for invalid in ["%", "100%", "%2", "%zz", "%+1", "%ff", "%é"] {
            assert_eq!(decode(invalid), None, "{invalid}");
        }
    }
}
