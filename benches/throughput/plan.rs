//! The benchmarks: which tables are read, how often, on how many connections at once, and in which modes.

use serde::{Deserialize, Serialize};

use crate::mode::Mode;

/// Rows per query, streams at once, and queries of all streams together. A run takes at least half a second of CPU time,
/// which is the case on a busy machine, where sleeping costs least.
const SHORT: [(u64, usize, u64); 4] = [(1, 1, 48_000), (20, 1, 25_600), (20, 8, 25_600), (20, 64, 25_600)];

/// A result that is long enough to make the cost of starting its query negligible.
const LONG: Size = Size { row_bytes: 134, rows: 16_000 };
const LONG_STREAMS: [usize; 3] = [1, 8, 64];
const LONG_QUERIES: u64 = 64;

/// Rows larger than the send buffer of Postgres (8 KB), so that each is sent at once; a stream of them takes 10 s.
const SLOW: Size = Size { row_bytes: 9 * 1024, rows: 100 };
const SLOW_STREAMS: usize = 80;

/// A row size, and the number of rows for a run of at least a third of a second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    pub(crate) row_bytes: usize,
    pub(crate) rows: u64,
}

const SIZES: [Size; 3] = [
    Size { row_bytes: 134, rows: 500_000 },
    Size { row_bytes: 1024, rows: 100_000 },
    Size { row_bytes: 20 * 1024, rows: 10_000 },
];

/// The table for the time to the first row. It has more of the largest rows than the kernel buffers hold, but few enough
/// to be read to the end.
pub(crate) const FIRST_ROW: Size = Size { row_bytes: 20 * 1024, rows: 600 };

impl Size {
    fn scaled(self, by: f64) -> Self {
        Self { rows: scaled(self.rows, by), ..self }
    }

    pub(crate) fn table(self) -> String {
        format!("orders_{}b_{}", self.row_bytes, self.rows)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "numbers of rows and queries are small"
)]
fn scaled(number: u64, by: f64) -> u64 {
    (number as f64 * by).ceil().max(1.0) as u64
}

/// The parts of the benchmark. All of them run unless some are selected.
#[derive(Debug, clap::Args)]
pub(crate) struct Parts {
    /// Run only the row benchmarks of these sizes in bytes: 134, 1024, 20480
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<usize>,
    /// Run only short queries and many streams at once
    #[arg(long)]
    short: bool,
    /// Run only streams that wait for Postgres
    #[arg(long)]
    slow: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The cost of a row, by its size.
    Rows,
    /// The cost of a query with few rows.
    Short,
    /// The cost of a row, by the number of streams at once.
    Long,
    /// The cost of streams that wait for Postgres.
    Slow,
}

impl Kind {
    /// Returns the mode with which a mode is compared.
    pub(crate) fn baseline(self, mode: Mode) -> Mode {
        match self {
            Self::Rows if mode.is_bytes() => Mode::RawBytes,
            Self::Rows => Mode::Raw,
            Self::Short | Self::Long | Self::Slow => Mode::RawPrepared,
        }
    }

    /// Returns the modes of this kind, in the order of the report.
    pub(crate) fn modes(self) -> &'static [Mode] {
        match self {
            Self::Rows => &Mode::ROWS,
            Self::Short | Self::Long => &Mode::STREAMS,
            Self::Slow => &Mode::SLOW,
        }
    }
}

/// A table and how it is read, which is the same in every mode.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) kind: Kind,
    pub(crate) size: Size,
    /// The number of connections that are read from at the same time.
    pub(crate) streams: usize,
    /// The number of queries on each connection, one after another. Each reads the whole table.
    pub(crate) queries: u64,
}

impl Case {
    /// Returns the selected cases, with `scale` times the default work.
    pub(crate) fn all(parts: &Parts, scale: f64) -> Vec<Self> {
        let everything = parts.sizes.is_empty() && !parts.short && !parts.slow;
        let mut cases = Vec::new();
        if everything || !parts.sizes.is_empty() {
            let is_selected = |size: &Size| everything || parts.sizes.contains(&size.row_bytes);
            cases.extend(SIZES.into_iter().filter(is_selected).map(|size| Self::rows(size.scaled(scale), 1)));
        }
        if everything || parts.short {
            cases.extend(SHORT.map(|(rows, streams, queries)| Self {
                kind: Kind::Short,
                size: Size { row_bytes: 134, rows },
                streams,
                queries: scaled(queries / streams as u64, scale),
            }));
            cases.extend(LONG_STREAMS.map(|streams| Self {
                kind: Kind::Long,
                size: LONG.scaled(scale),
                streams,
                queries: LONG_QUERIES / streams as u64,
            }));
        }
        if everything || parts.slow {
            let size = SLOW.scaled(scale);
            cases.push(Self { kind: Kind::Slow, size, streams: SLOW_STREAMS, queries: 1 });
        }
        cases
    }

    /// Reads a table `queries` times, one stream after another.
    pub(crate) fn rows(size: Size, queries: u64) -> Self {
        Self { kind: Kind::Rows, size, streams: 1, queries }
    }

    /// Returns whether the time to the first row is measured as well.
    pub(crate) fn has_first_row(&self) -> bool {
        self.kind == Kind::Rows && self.size.row_bytes == FIRST_ROW.row_bytes
    }

    /// Returns the name of the table or view. No two cases share one, so that their telemetry can be distinguished.
    pub(crate) fn entity(&self) -> String {
        let table = self.size.table();
        match self.kind {
            Kind::Rows => table,
            Kind::Short | Kind::Long => format!("{table}_x{}", self.streams),
            Kind::Slow => format!("{table}_slow"),
        }
    }

    pub(crate) fn all_queries(&self) -> u64 {
        self.queries * self.streams as u64
    }

    pub(crate) fn all_rows(&self) -> u64 {
        self.size.rows * self.all_queries()
    }

    pub(crate) fn warm_up(&self) -> WarmUp {
        match self.kind {
            // The measured statement itself, so that every client that caches statements has it.
            Kind::Short => WarmUp { queries: 10, limit: None },
            Kind::Rows | Kind::Long | Kind::Slow => {
                WarmUp { queries: 1, limit: Some((self.size.rows / 50).max(1)) }
            }
        }
    }

    /// Returns the number of warm-up rows, which telemetry counts but the benchmark does not.
    pub(crate) fn warm_up_rows(&self) -> u64 {
        let WarmUp { queries, limit } = self.warm_up();
        queries * limit.unwrap_or(self.size.rows) * self.streams as u64
    }

    /// Returns the number of rounds: at most one for streams that wait, since more would not improve the measurement.
    pub(crate) fn rounds(&self, requested: usize) -> usize {
        if self.kind == Kind::Slow { requested.min(1) } else { requested }
    }
}

/// The first queries of a connection, which are not measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct WarmUp {
    pub(crate) queries: u64,
    pub(crate) limit: Option<u64>,
}
