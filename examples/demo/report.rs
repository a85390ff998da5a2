//! The final report: channel occupancy, the consumer's time, and the verdicts.

use std::fmt::Write as _;

use fraiseql_stream::{Stats, Verdict};

use crate::figures::{Paint, percent, seconds, stacked};
use crate::occupancy::{Memory, Occupancy};

/// The heights of a histogram column.
const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// Formats the report from the streams' statistics and the recorded histograms.
pub(crate) fn report(paint: Paint, streams: &[Stats], memory: &Memory) -> String {
    let recorded: Vec<_> =
        streams.iter().filter_map(|stats| Some((stats, memory.occupancy(&stats.entity)?))).collect();
    let tables = [occupancy(paint, &recorded), time(paint, streams), pace(paint, streams)];
    format!("\n{}", tables.join("\n"))
}

fn occupancy(paint: Paint, recorded: &[(&Stats, Occupancy)]) -> String {
    let mut text = paint.bold("Rows waiting in the channel when the consumer asked for more");
    text += "\n   the library's histogram fraiseql_channel_occupancy_rows\n";
    let Some((_, first)) = recorded.first() else {
        return text + "   no measurements\n";
    };
    // Columns after the last non-empty bucket are omitted.
    let used = |(_, occupancy): &(&Stats, Occupancy)| occupancy.counts.iter().rposition(|count| *count > 0);
    let columns = recorded.iter().filter_map(used).max().map_or(0, |last| last + 1);
    let _ = write!(text, "   {:<17}", "up to");
    for bound in first.bounds.iter().take(columns) {
        let _ = write!(text, "{bound:>4}");
    }
    let _ = writeln!(text, "{:>7}{:>6}", "p50", "p95");
    for (stats, occupancy) in recorded {
        let _ = write!(text, "   {:<17}", stats.entity);
        let highest = occupancy.counts.iter().max().copied().unwrap_or(0).max(1);
        for count in occupancy.counts.iter().take(columns) {
            let _ = write!(text, " {}", column(*count, highest));
        }
        let [p50, p95] = [0.5, 0.95].map(|quantile| occupancy.quantile(quantile));
        let _ = writeln!(text, "{p50:>7.0}{p95:>6.0}");
    }
    text
}

/// Draws a bucket's column in proportion to the highest bucket, whose height is 8.
fn column(count: u64, highest: u64) -> String {
    if count == 0 {
        return "   ".to_owned();
    }
    let block = (1..8).zip(BLOCKS).find(|(height, _)| count * 8 <= highest * height);
    block.map_or('█', |(_, block)| block).to_string().repeat(3)
}

fn time(paint: Paint, streams: &[Stats]) -> String {
    let mut text = paint.bold("Where the consumer's time went");
    text += "\n   w waiting for Postgres  s ready, not running  d decoding JSON  c your code\n";
    let _ = writeln!(text, "{:>50}{:>6}{:>6}{:>6}{:>10}", 'w', 's', 'd', 'c', "total");
    for stats in streams {
        let time = &stats.time;
        let parts =
            [('w', time.source_wait), ('s', time.scheduled), ('d', time.decode), ('c', time.consumer)]
                .map(|(letter, time)| (letter, time.as_secs_f64()));
        let _ = write!(text, "   {:<17}[{}]", stats.entity, stacked(&parts, 24));
        let total: f64 = parts.iter().map(|(_, part)| part).sum();
        for (_, part) in parts {
            let _ = write!(text, "{:>6}", percent(part / total.max(f64::MIN_POSITIVE)));
        }
        let _ = writeln!(text, "{:>8}", seconds(stats.elapsed));
    }
    text
}

fn pace(paint: Paint, streams: &[Stats]) -> String {
    let mut text = paint.bold("Which side set the pace") + "\n";
    for stats in streams {
        let verdict = paint.verdict(stats);
        let reason = reason(stats.verdict());
        let _ = writeln!(text, "   {:<17}{verdict}  {reason}", stats.entity);
    }
    text
}

fn reason(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::ConsumerBound => "rows waited for your code",
        Verdict::SourceBound => "your code waited for Postgres",
        Verdict::RuntimeBound => "your task was ready but not running",
        Verdict::Mixed => "several sides waited, and none dominates",
        _ => "neither side waited much",
    }
}
