//! The clients that are compared, each used as its users would.

use fraiseql_stream::RawJson;
use futures_util::{StreamExt as _, TryStreamExt as _};
use sqlx::{AssertSqlSafe, Connection as _};
use tokio_postgres::types::{FromSql, Json, Type};
use tokio_postgres::{NoTls, RowStream, Statement};

use crate::Failure;
use crate::document::Order;

/// A client that reads rows.
pub(crate) trait Peer: Sized + Send + 'static {
    /// Connects, ready for the given number of queries.
    fn connect(url: &str, queries: u64) -> impl Future<Output = Result<Self, Failure>> + Send;

    /// Reads a table, or at most `limit` of its rows, in the order in which Postgres sends them. Calls `take` with the
    /// checksum of each row.
    fn read(
        &mut self,
        table: &str,
        limit: Option<u64>,
        take: impl FnMut(u64) + Send,
    ) -> impl Future<Output = Result<(), Failure>> + Send;
}

fn sql(table: &str, limit: Option<u64>) -> String {
    let limit = limit.map_or_else(String::new, |rows| format!(" LIMIT {rows}"));
    format!("SELECT data FROM {table}{limit}")
}

/// tokio-postgres with the SQL text in each query.
pub(crate) struct Raw(tokio_postgres::Client);

impl Peer for Raw {
    async fn connect(url: &str, _: u64) -> Result<Self, Failure> {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
        tokio::spawn(connection);
        Ok(Self(client))
    }

    async fn read(
        &mut self,
        table: &str,
        limit: Option<u64>,
        take: impl FnMut(u64) + Send,
    ) -> Result<(), Failure> {
        decode(self.0.query_raw(&sql(table, limit), [0_i32; 0]).await?, take).await
    }
}

async fn decode(rows: RowStream, mut take: impl FnMut(u64) + Send) -> Result<(), Failure> {
    let mut rows = std::pin::pin!(rows);
    while let Some(row) = rows.try_next().await? {
        let Json(order): Json<Order> = row.try_get(0)?;
        take(order.checksum());
    }
    Ok(())
}

/// The same as [`Raw`], with a statement that is prepared once.
pub(crate) struct RawPrepared {
    raw: Raw,
    /// The last statement and its text.
    statement: Option<(String, Statement)>,
}

impl Peer for RawPrepared {
    async fn connect(url: &str, queries: u64) -> Result<Self, Failure> {
        Ok(Self { raw: Raw::connect(url, queries).await?, statement: None })
    }

    async fn read(
        &mut self,
        table: &str,
        limit: Option<u64>,
        take: impl FnMut(u64) + Send,
    ) -> Result<(), Failure> {
        let (client, text) = (&self.raw.0, sql(table, limit));
        let statement = match &self.statement {
            Some((known, statement)) if *known == text => statement,
            _ => {
                let statement = client.prepare(&text).await?;
                &self.statement.insert((text, statement)).1
            }
        };
        decode(client.query_raw(statement, [0_i32; 0]).await?, take).await
    }
}

/// The same as [`Raw`], without decoding.
pub(crate) struct RawBytes(Raw);

impl Peer for RawBytes {
    async fn connect(url: &str, queries: u64) -> Result<Self, Failure> {
        Ok(Self(Raw::connect(url, queries).await?))
    }

    async fn read(
        &mut self,
        table: &str,
        limit: Option<u64>,
        mut take: impl FnMut(u64) + Send,
    ) -> Result<(), Failure> {
        let rows = self.0.0.query_raw(&sql(table, limit), [0_i32; 0]).await?;
        let mut rows = std::pin::pin!(rows);
        while let Some(row) = rows.try_next().await? {
            let Text(text) = row.try_get(0)?;
            take(text.len() as u64);
        }
        Ok(())
    }
}

/// The text of a jsonb value, which follows a version byte.
struct Text<'a>(&'a [u8]);

impl<'a> FromSql<'a> for Text<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Failure> {
        Ok(Self(raw.strip_prefix(&[1]).ok_or("the jsonb version is unknown (expected 1)")?))
    }

    fn accepts(ty: &Type) -> bool {
        *ty == Type::JSONB
    }
}

/// fraiseql-stream. It exports telemetry if that was set up before.
pub(crate) struct Stream(fraiseql_stream::Connection);

impl Peer for Stream {
    async fn connect(url: &str, _: u64) -> Result<Self, Failure> {
        Ok(Self(fraiseql_stream::Connection::connect(url).await?))
    }

    async fn read(
        &mut self,
        table: &str,
        limit: Option<u64>,
        mut take: impl FnMut(u64) + Send,
    ) -> Result<(), Failure> {
        let mut query = self.0.query::<Order>(table);
        if let Some(rows) = limit {
            query = query.limit(rows);
        }
        let mut orders = query.stream().await?;
        while let Some(order) = orders.try_next().await? {
            take(order.checksum());
        }
        Ok(())
    }
}

/// The same as [`Stream`], without decoding.
pub(crate) struct StreamBytes(Stream);

impl Peer for StreamBytes {
    async fn connect(url: &str, queries: u64) -> Result<Self, Failure> {
        Ok(Self(Stream::connect(url, queries).await?))
    }

    async fn read(
        &mut self,
        table: &str,
        limit: Option<u64>,
        mut take: impl FnMut(u64) + Send,
    ) -> Result<(), Failure> {
        let mut query = self.0.0.query::<RawJson>(table);
        if let Some(rows) = limit {
            query = query.limit(rows);
        }
        let mut rows = query.stream().await?;
        while let Some(row) = rows.try_next().await? {
            take(row.as_bytes().len() as u64);
        }
        Ok(())
    }
}

/// fraiseql-wire. Each query consumes a connection, so there is one per query.
pub(crate) struct Wire(Vec<fraiseql_wire::FraiseClient>);

impl Peer for Wire {
    async fn connect(url: &str, queries: u64) -> Result<Self, Failure> {
        let mut clients = Vec::new();
        for _ in 0..queries {
            clients.push(fraiseql_wire::FraiseClient::connect(url).await?);
        }
        Ok(Self(clients))
    }

    async fn read(
        &mut self,
        table: &str,
        limit: Option<u64>,
        mut take: impl FnMut(u64) + Send,
    ) -> Result<(), Failure> {
        let client = self.0.pop().ok_or("all connections have been used")?;
        let mut query = client.query::<Order>(table);
        if let Some(rows) = limit {
            query = query.limit(usize::try_from(rows)?);
        }
        let mut orders = query.execute().await?;
        while let Some(order) = orders.next().await {
            take(order?.checksum());
        }
        Ok(())
    }
}

/// sqlx.
pub(crate) struct Sqlx(sqlx::PgConnection);

impl Peer for Sqlx {
    async fn connect(url: &str, _: u64) -> Result<Self, Failure> {
        Ok(Self(sqlx::PgConnection::connect(url).await?))
    }

    async fn read(
        &mut self,
        table: &str,
        limit: Option<u64>,
        mut take: impl FnMut(u64) + Send,
    ) -> Result<(), Failure> {
        let query = sqlx::query_scalar(AssertSqlSafe(sql(table, limit)));
        let mut orders = query.fetch(&mut self.0);
        while let Some(sqlx::types::Json(order)) = orders.try_next().await? {
            let order: Order = order;
            take(order.checksum());
        }
        Ok(())
    }
}
