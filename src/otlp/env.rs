//! Reads single `OTEL_*` variables as the specification asks: an empty value counts as unset, and an invalid one is
//! replaced by the default with a warning.

use std::fmt::Display;
use std::str::FromStr;

/// Returns the value of the variable with this name.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

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

    pub(super) fn positive<N>(&mut self, name: &str, default: N) -> N
    where
        N: FromStr + PartialOrd + From<u8> + Display + Copy,
    {
        let Some(value) = self.get(name) else {
            return default;
        };
        match value.parse() {
            Ok(number) if number > N::from(0) => number,
            _ => {
                self.refuse((name, &value), "a whole number above 0", default);
                default
            }
        }
    }

    /// Reads a ratio from 0 to 1.
    pub(super) fn ratio(&mut self, name: &str) -> f64 {
        let Some(value) = self.get(name) else {
            return 1.0;
        };
        match value.parse() {
            Ok(ratio) if (0.0..=1.0).contains(&ratio) => ratio,
            _ => {
                self.refuse((name, &value), "a ratio from 0 to 1", 1);
                1.0
            }
        }
    }
}
