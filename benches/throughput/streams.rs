//! The report on short queries, on many streams at once, and on streams that wait.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::child::Outcome;
use crate::f64_of;
use crate::mode::Mode;
use crate::plan::{Case, Kind};
use crate::report::{Runs, Spread, round};

/// The unit to which costs are related.
struct Unit {
    name: &'static str,
    /// The number of units in a run.
    number: f64,
    digits: usize,
}

impl Unit {
    fn of(case: &Case) -> Self {
        match case.kind {
            Kind::Short => Self { name: "query", number: f64_of(case.all_queries()), digits: 1 },
            Kind::Rows | Kind::Long | Kind::Slow => {
                Self { name: "row", number: f64_of(case.all_rows()), digits: 3 }
            }
        }
    }
}

impl Runs {
    /// Writes CPU time and elapsed time per unit. All streams share the elapsed time, so it decreases with their number.
    pub(crate) fn streams_table(&self, out: &mut impl Write) -> io::Result<()> {
        let unit = Unit::of(&self.case);
        writeln!(out, "\n{}", title(&self.case))?;
        write!(out, "{:21}", "mode")?;
        let [cpu, wall, sleeps] = ["CPU us", "wall us", "sleeps"].map(|cost| format!("{cost}/{}", unit.name));
        write!(out, " {cpu:>13} {:>12} {:>15}", "to prepared", "(min .. max)")?;
        writeln!(out, " {wall:>14} {:>12} {sleeps:>13}", "to prepared")?;
        for mode in self.modes() {
            let digits = unit.digits;
            let [(cpu, cpu_ratio), (wall, wall_ratio)] = [cpu_us, wall_us].map(|cost| {
                let cost = |run: &Outcome| cost(run) / unit.number;
                (self.spread(mode, cost).median, self.ratios(mode, cost))
            });
            let sleeps = self.spread(mode, |run| f64_of(run.sleeps) / unit.number).median;
            write!(out, "{mode:21} {cpu:13.digits$} {:11.2}x {:>15}", cpu_ratio.median, cpu_ratio.range(2))?;
            writeln!(out, " {wall:14.digits$} {:11.2}x {sleeps:13.3}", wall_ratio.median)?;
        }
        for mode in self.modes() {
            let received = self.spans_received(mode).filter(|received| *received < 0.995);
            if let Some(received) = received {
                writeln!(out, "{mode}: the collector received {:.0} % of the query spans", received * 100.0)?;
            }
        }
        Ok(())
    }

    fn spans_received(&self, mode: Mode) -> Option<f64> {
        self.spans.get(&mode).map(|shares| Spread::of(shares.clone()).median)
    }

    pub(crate) fn slow_table(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "\n{}", title(&self.case))?;
        writeln!(out, "{:21} {:>15} {:>12} {:>12}", "mode", "CPU % of a core", "to prepared", "CPU us/row")?;
        for mode in self.modes() {
            let (percent, ratio) = (self.spread(mode, core_percent), self.ratios(mode, core_percent));
            let row = self.spread(mode, Outcome::cpu_us_per_row);
            writeln!(out, "{mode:21} {:15.2} {:11.2}x {:12.1}", percent.median, ratio.median, row.median)?;
        }
        Ok(())
    }

    pub(crate) fn streams_json(&self, out: &mut impl Write) -> io::Result<()> {
        let unit = Unit::of(&self.case);
        for mode in self.modes() {
            let mut line = self.head(mode);
            for (name, cost) in [("cpu", cpu_us as fn(&Outcome) -> f64), ("wall", wall_us)] {
                let cost = |run: &Outcome| cost(run) / unit.number;
                put(&mut line, &format!("{name}_us_per_{}", unit.name), &self.spread(mode, cost));
                put(&mut line, &format!("{name}_ratio_to_prepared"), &self.ratios(mode, cost));
            }
            let kernel = |run: &Outcome| run.system.as_secs_f64() * 1e6 / unit.number;
            let sleeps = |run: &Outcome| f64_of(run.sleeps) / unit.number;
            line[format!("kernel_us_per_{}", unit.name)] = round(self.spread(mode, kernel).median).into();
            line[format!("sleeps_per_{}", unit.name)] = round(self.spread(mode, sleeps).median).into();
            if self.case.kind == Kind::Slow {
                put(&mut line, "core_percent", &self.spread(mode, core_percent));
                put(&mut line, "core_percent_ratio_to_prepared", &self.ratios(mode, core_percent));
            }
            if let Some(received) = self.spans_received(mode) {
                line["query_spans_received"] = round(received).into();
            }
            writeln!(out, "{line}")?;
        }
        Ok(())
    }

    fn head(&self, mode: Mode) -> Value {
        json!({
            "row_bytes": self.case.size.row_bytes,
            "rows_per_query": self.case.size.rows,
            "streams": self.case.streams,
            "queries": self.case.all_queries(),
            "mode": mode.to_string(),
            "rounds": self.number_of(mode),
        })
    }
}

fn title(case: &Case) -> String {
    let (rows, streams) = (case.size.rows, case.streams);
    format!(
        "{rows} row{} of {} B per query{}, {streams} stream{}; {} queries",
        if rows == 1 { "" } else { "s" },
        case.size.row_bytes,
        if case.kind == Kind::Slow { ", one every 100 ms" } else { "" },
        if streams == 1 { "" } else { "s at once" },
        case.all_queries()
    )
}

fn put(line: &mut Value, name: &str, spread: &Spread) {
    line[name] = round(spread.median).into();
    line[format!("{name}_min")] = round(spread.min).into();
    line[format!("{name}_max")] = round(spread.max).into();
}

fn cpu_us(run: &Outcome) -> f64 {
    run.cpu().as_secs_f64() * 1e6
}

fn wall_us(run: &Outcome) -> f64 {
    run.wall.as_secs_f64() * 1e6
}

fn core_percent(run: &Outcome) -> f64 {
    run.cpu().as_secs_f64() / run.wall.as_secs_f64() * 100.0
}
