//! The Postgres of this test binary.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use backends::Postgres;

pub(crate) fn postgres() -> &'static Postgres {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    SERVER.get_or_init(|| Postgres::start().expect("a private Postgres"))
}

/// A database for one test.
pub(crate) struct Database {
    pub(crate) name: String,
    pub(crate) url: String,
}

/// Creates a database and runs the script in it.
pub(crate) fn database(script: &str) -> Database {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let name = format!("telemetry_{}", MADE.fetch_add(1, Ordering::Relaxed));
    let url = postgres().create_database(&name).expect("a database");
    postgres().psql(&name, script).expect("the script runs");
    Database { name, url }
}

/// Returns a script for a table `name` of `rows` small documents with an increasing `id`.
pub(crate) fn table(name: &str, rows: u32) -> String {
    format!(
        "CREATE TABLE {name} AS SELECT jsonb_build_object('id', i, 'status', 'open', 'note', repeat('x', 60)) AS data
           FROM generate_series(1, {rows}) i ORDER BY i;"
    )
}

/// Returns a script for a view whose rows take Postgres `seconds` each. They are large enough to be sent one by one.
pub(crate) fn slow_view(name: &str, rows: u32, seconds: f64) -> String {
    format!(
        "CREATE VIEW {name} AS SELECT jsonb_build_object('id', i, 'note', repeat('x', 9000), 'slept', pg_sleep({seconds})::text) AS data
           FROM generate_series(1, {rows}) i;"
    )
}

/// A script for a view that returns nothing for a minute.
pub(crate) const SILENT: &str =
    "CREATE VIEW silent AS SELECT jsonb_build_object('id', 1, 'slept', pg_sleep(60)::text) AS data;";

/// A script for a view that fails with SQLSTATE 22012 after 50 rows.
pub(crate) const BROKEN: &str = "CREATE VIEW broken AS SELECT jsonb_build_object('id', i, 'part', 1 / (51 - i)) AS data FROM generate_series(1, 100) i;";
