//! From runs to medians, as a table or as JSON lines.

use std::collections::HashMap;
use std::io::{self, Write};

use serde_json::json;

use crate::child::Outcome;
use crate::f64_of;
use crate::mode::Mode;

/// The runs of one size of rows, and the modes' times to the first row where they were measured.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    pub(crate) row_bytes: usize,
    pub(crate) rows: u64,
    /// For each mode, one outcome a round.
    pub(crate) rounds: HashMap<Mode, Vec<Outcome>>,
    /// For each mode, in milliseconds.
    pub(crate) first_rows: HashMap<Mode, Vec<f64>>,
}

impl Runs {
    fn costs(&self, mode: Mode) -> Vec<f64> {
        self.rounds.get(&mode).into_iter().flatten().map(Outcome::cpu_us_per_row).collect()
    }

    /// Each round's cost in relation to the basis in the same round.
    fn ratios(&self, mode: Mode) -> Vec<f64> {
        self.costs(mode).into_iter().zip(self.costs(mode.basis())).map(|(cost, basis)| cost / basis).collect()
    }

    fn median(&self, mode: Mode, value: impl Fn(&Outcome) -> f64) -> f64 {
        Spread::of(self.rounds.get(&mode).into_iter().flatten().map(value).collect()).median
    }

    fn modes(&self) -> impl Iterator<Item = Mode> {
        let all = Mode::TYPED.into_iter().chain(Mode::BYTES);
        all.filter(|mode| self.rounds.contains_key(mode))
    }

    pub(crate) fn table(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "\n{} rows of {} B", self.rows, self.row_bytes)?;
        write!(
            out,
            "{:27} {:>12} {:>19} {:>9} {:>17} {:>8}",
            "mode", "CPU us/row", "(min .. max)", "to raw", "(min .. max)", "kernel"
        )?;
        writeln!(out, "{}", if self.first_rows.is_empty() { "" } else { "  first row, ms" })?;
        for mode in self.modes() {
            let (cost, ratio) = (Spread::of(self.costs(mode)), Spread::of(self.ratios(mode)));
            write!(
                out,
                "{mode:27} {:12.3} {:>19} {:8.3}x {:>17}",
                cost.median,
                cost.range(),
                ratio.median,
                ratio.range()
            )?;
            let kernel =
                self.median(mode, |run| run.system.as_secs_f64() / (run.user + run.system).as_secs_f64());
            write!(out, " {:6.0} %", kernel * 100.0)?;
            match self.first_rows.get(&mode) {
                Some(times) => writeln!(out, " {:14.2}", Spread::of(times.clone()).median)?,
                None => writeln!(out)?,
            }
        }
        Ok(())
    }

    pub(crate) fn json(&self, out: &mut impl Write) -> io::Result<()> {
        for mode in self.modes() {
            let (cost, ratio) = (Spread::of(self.costs(mode)), Spread::of(self.ratios(mode)));
            let mut line = json!({
                "row_bytes": self.row_bytes,
                "mode": mode.to_string(),
                "cpu_us_per_row": round(cost.median),
                "cpu_us_per_row_min": round(cost.min),
                "cpu_us_per_row_max": round(cost.max),
                "ratio_to_raw": round(ratio.median),
                "ratio_to_raw_min": round(ratio.min),
                "ratio_to_raw_max": round(ratio.max),
                "kernel_us_per_row": round(self.median(mode, |run| run.per_row(run.system.as_secs_f64() * 1e6))),
                "page_faults_per_row": round(self.median(mode, |run| run.per_row(f64_of(run.faults)))),
                "sleeps_per_row": round(self.median(mode, |run| run.per_row(f64_of(run.sleeps)))),
                "rows": self.rows,
                "rounds": self.costs(mode).len(),
            });
            if mode.has_telemetry() {
                line["flush_cpu_ms"] = round(self.median(mode, |run| run.flush.as_secs_f64() * 1e3)).into();
            }
            if let Some(times) = self.first_rows.get(&mode) {
                line["ttfr_ms"] = round(Spread::of(times.clone()).median).into();
            }
            writeln!(out, "{line}")?;
        }
        Ok(())
    }
}

fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    /// All are NaN if there is no value.
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
        let (low, high) = (values.len().saturating_sub(1) / 2, values.len() / 2);
        Self { median: f64::midpoint(at(low), at(high)), min: at(0), max: at(values.len().saturating_sub(1)) }
    }

    fn range(&self) -> String {
        format!("({:.3} .. {:.3})", self.min, self.max)
    }
}
