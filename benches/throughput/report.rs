//! Medians of all runs, as a table or as JSON lines.

use std::collections::HashMap;
use std::io::{self, Write};

use serde_json::json;

use crate::child::Outcome;
use crate::f64_of;
use crate::mode::Mode;
use crate::plan::{Case, Kind};

/// The runs of a case.
#[derive(Debug)]
pub(crate) struct Runs {
    pub(crate) case: Case,
    /// One outcome per round for each mode.
    pub(crate) rounds: HashMap<Mode, Vec<Outcome>>,
    /// The times to the first row for each mode, in milliseconds; empty if not measured.
    pub(crate) first_rows: HashMap<Mode, Vec<f64>>,
    /// The share of the query spans that the collector received, for each mode with telemetry.
    pub(crate) spans: HashMap<Mode, Vec<f64>>,
}

impl Runs {
    pub(crate) fn new(case: Case) -> Self {
        Self { case, rounds: HashMap::new(), first_rows: HashMap::new(), spans: HashMap::new() }
    }

    fn of(&self, mode: Mode) -> impl Iterator<Item = &Outcome> {
        self.rounds.get(&mode).into_iter().flatten()
    }

    pub(crate) fn number_of(&self, mode: Mode) -> usize {
        self.of(mode).count()
    }

    pub(crate) fn spread(&self, mode: Mode, value: impl Fn(&Outcome) -> f64) -> Spread {
        Spread::of(self.of(mode).map(value).collect())
    }

    /// Returns the ratios of each round's value to that of the baseline in the same round.
    pub(crate) fn ratios(&self, mode: Mode, value: impl Fn(&Outcome) -> f64) -> Spread {
        let baselines = self.of(self.case.kind.baseline(mode));
        Spread::of(self.of(mode).zip(baselines).map(|(run, baseline)| value(run) / value(baseline)).collect())
    }

    /// Returns the modes that were run, in the order of the report.
    pub(crate) fn modes(&self) -> impl Iterator<Item = Mode> {
        self.case.kind.modes().iter().copied().filter(|mode| self.rounds.contains_key(mode))
    }

    pub(crate) fn write(&self, out: &mut impl Write, as_json: bool) -> io::Result<()> {
        match (self.case.kind, as_json) {
            (Kind::Rows, false) => self.rows_table(out),
            (Kind::Rows, true) => self.rows_json(out),
            (Kind::Short | Kind::Long, false) => self.streams_table(out),
            (Kind::Slow, false) => self.slow_table(out),
            (Kind::Short | Kind::Long | Kind::Slow, true) => self.streams_json(out),
        }
    }

    fn rows_table(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "\n{} rows of {} B", self.case.size.rows, self.case.size.row_bytes)?;
        write!(
            out,
            "{:27} {:>12} {:>19} {:>9} {:>17} {:>8}",
            "mode", "CPU us/row", "(min .. max)", "to raw", "(min .. max)", "kernel"
        )?;
        writeln!(out, "{}", if self.first_rows.is_empty() { "" } else { "  first row, ms" })?;
        for mode in self.modes() {
            let cost = self.spread(mode, Outcome::cpu_us_per_row);
            let ratio = self.ratios(mode, Outcome::cpu_us_per_row);
            write!(
                out,
                "{mode:27} {:12.3} {:>19} {:8.3}x {:>17}",
                cost.median,
                cost.range(3),
                ratio.median,
                ratio.range(3)
            )?;
            let kernel = self.spread(mode, |run| run.system.as_secs_f64() / run.cpu().as_secs_f64());
            write!(out, " {:6.0} %", kernel.median * 100.0)?;
            match self.first_rows.get(&mode) {
                Some(times) => writeln!(out, " {:14.2}", Spread::of(times.clone()).median)?,
                None => writeln!(out)?,
            }
        }
        Ok(())
    }

    fn rows_json(&self, out: &mut impl Write) -> io::Result<()> {
        for mode in self.modes() {
            let cost = self.spread(mode, Outcome::cpu_us_per_row);
            let ratio = self.ratios(mode, Outcome::cpu_us_per_row);
            let median = |value: fn(&Outcome) -> f64| round(self.spread(mode, value).median);
            let mut line = json!({
                "row_bytes": self.case.size.row_bytes,
                "mode": mode.to_string(),
                "cpu_us_per_row": round(cost.median),
                "cpu_us_per_row_min": round(cost.min),
                "cpu_us_per_row_max": round(cost.max),
                "ratio_to_raw": round(ratio.median),
                "ratio_to_raw_min": round(ratio.min),
                "ratio_to_raw_max": round(ratio.max),
                "kernel_us_per_row": median(|run| run.per_row(run.system.as_secs_f64() * 1e6)),
                "page_faults_per_row": median(|run| run.per_row(f64_of(run.faults))),
                "sleeps_per_row": median(|run| run.per_row(f64_of(run.sleeps))),
                "rows": self.case.size.rows,
                "rounds": self.number_of(mode),
            });
            if mode.has_telemetry() {
                line["flush_cpu_ms"] = median(|run| run.flush.as_secs_f64() * 1e3).into();
            }
            if let Some(times) = self.first_rows.get(&mode) {
                line["ttfr_ms"] = round(Spread::of(times.clone()).median).into();
            }
            writeln!(out, "{line}")?;
        }
        Ok(())
    }
}

pub(crate) fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// All fields are NaN if there is no value.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
        Self { median: f64::midpoint(at(low), at(high)), min: at(0), max: at(values.len().saturating_sub(1)) }
    }

    /// Formats the range from the smallest to the largest value.
    pub(crate) fn range(&self, digits: usize) -> String {
        format!("({:.digits$} .. {:.digits$})", self.min, self.max)
    }
}
