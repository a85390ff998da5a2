//! The tables and views that the consumers read.

use std::sync::OnceLock;

use crate::server::{Database, shared, table_script, trickle};

/// A role whose password, its own name, takes one iteration of SCRAM instead of 4,096: in a debug build, the
/// default would use more CPU than the rest of a case.
const ROLE: &str = "CREATE ROLE consumers SUPERUSER LOGIN PASSWORD 'SCRAM-SHA-256$1:Y29uc3VtZXJz$MmyRk20Ac/CBcIoLbtmCqb00IMO3nURRndpx3FqpqLE=:CzCvqRs7X/Ek9zYjcxXy49ZAEEPocaDS3CorDvq6fhY=';";

/// Two tables that outlast every consumer, `fast` of 1 kB a row and `small` of 30 B, and the views
/// `every_1_ms`, `every_5_ms` and `every_10_ms`.
fn database() -> &'static Database {
    static DATABASE: OnceLock<Database> = OnceLock::new();
    DATABASE.get_or_init(|| {
        let tables = [("fast", 60_000, 1_000), ("small", 100_000, 10)];
        let tables = tables.map(|(name, rows, pad)| table_script(name, rows, pad));
        let views = [1, 5, 10].map(|ms| trickle(&format!("every_{ms}_ms"), 2_000, f64::from(ms) / 1e3));
        Database::with(&format!("{ROLE} {} {}", tables.concat(), views.concat()))
    })
}

/// The connection string for TCP.
pub(super) fn url() -> String {
    let (name, port) = (&database().name, shared().port());
    format!("postgres://consumers:consumers@127.0.0.1:{port}/{name}")
}

/// The connection string for the Unix socket.
pub(super) fn socket() -> String {
    let (name, dir, port) = (&database().name, shared().socket_dir().display(), shared().port());
    format!("host={dir} port={port} user=consumers password=consumers dbname={name}")
}
