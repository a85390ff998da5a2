//! What is measured: which tables are read, how often, on how many connections at once, and in which modes.

use serde::{Deserialize, Serialize};

use crate::mode::Mode;
use crate::server::{FIRST_ROW, SIZES, Size, scaled};

/// Rows of a query, streams at once, and queries of all streams together: about half a second of CPU time on a busy
/// machine, where sleeping costs least, or more.
const SHORT: [(u64, usize, u64); 4] = [(1, 1, 48_000), (20, 1, 25_600), (20, 8, 25_600), (20, 64, 25_600)];

/// A result so long that the start of its query carries no weight.
const LONG: Size = Size { row_bytes: 134, rows: 16_000 };
const LONG_STREAMS: [usize; 3] = [1, 8, 64];
const LONG_QUERIES: u64 = 64;

/// Larger than the send buffer of Postgres (8 KB), so that each row leaves the server at once; 10 s of them.
const SLOW: Size = Size { row_bytes: 9 * 1024, rows: 100 };
const SLOW_STREAMS: usize = 80;

/// The parts of the benchmark; all of them run unless some are chosen.
#[derive(Debug, clap::Args)]
pub(crate) struct Parts {
    /// Only rows of these sizes in bytes: 134, 1024, 20480
    #[arg(long, value_delimiter = ',')]
    sizes: Vec<usize>,
    /// Only short queries, and many streams at once
    #[arg(long)]
    short: bool,
    /// Only streams that wait for Postgres
    #[arg(long)]
    slow: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// What a row costs, by its size.
    Rows,
    /// What a query of few rows costs.
    Short,
    /// What a row costs, by the number of streams at once.
    Long,
    /// What streams cost that wait for Postgres.
    Slow,
}

impl Kind {
    /// What the cost of a mode is compared with.
    pub(crate) fn basis(self, mode: Mode) -> Mode {
        match self {
            Self::Rows if mode.is_bytes() => Mode::RawBytes,
            Self::Rows => Mode::Raw,
            Self::Short | Self::Long | Self::Slow => Mode::RawPrepared,
        }
    }

    /// In the order of the report.
    pub(crate) fn modes(self) -> &'static [Mode] {
        match self {
            Self::Rows => &Mode::ROWS,
            Self::Short | Self::Long => &Mode::STREAMS,
            Self::Slow => &Mode::SLOW,
        }
    }
}

/// A table and how it is read, in every mode alike.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) kind: Kind,
    pub(crate) size: Size,
    /// Connections that are read from at the same time.
    pub(crate) streams: usize,
    /// Queries of each connection, one after another, each of the whole table.
    pub(crate) queries: u64,
}

impl Case {
    /// All that are asked for, with `scale` times the usual work.
    pub(crate) fn all(parts: &Parts, scale: f64) -> Vec<Self> {
        let everything = parts.sizes.is_empty() && !parts.short && !parts.slow;
        let mut cases = Vec::new();
        if everything || !parts.sizes.is_empty() {
            let is_chosen = |size: &Size| everything || parts.sizes.contains(&size.row_bytes);
            cases.extend(SIZES.into_iter().filter(is_chosen).map(|size| Self::rows(size.scaled(scale), 1)));
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

    /// One stream after another of a table.
    pub(crate) fn rows(size: Size, queries: u64) -> Self {
        Self { kind: Kind::Rows, size, streams: 1, queries }
    }

    /// Are its modes also measured by their time to the first row?
    pub(crate) fn has_first_row(&self) -> bool {
        self.kind == Kind::Rows && self.size.row_bytes == FIRST_ROW.row_bytes
    }

    /// What its modes read: no other case reads the same, so that telemetry can be told apart by it.
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
            // The very statement that is measured, so that all who keep statements have it.
            Kind::Short => WarmUp { queries: 10, limit: None },
            Kind::Rows | Kind::Long | Kind::Slow => {
                WarmUp { queries: 1, limit: Some((self.size.rows / 50).max(1)) }
            }
        }
    }

    /// Rows that are not counted here, but by telemetry.
    pub(crate) fn warm_up_rows(&self) -> u64 {
        let WarmUp { queries, limit } = self.warm_up();
        queries * limit.unwrap_or(self.size.rows) * self.streams as u64
    }

    /// Streams that wait are not measured better by being measured often.
    pub(crate) fn rounds(&self, wanted: usize) -> usize {
        if self.kind == Kind::Slow { wanted.min(1) } else { wanted }
    }
}

/// First queries of a connection, which are not counted.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct WarmUp {
    pub(crate) queries: u64,
    pub(crate) limit: Option<u64>,
}
