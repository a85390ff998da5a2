//! The server with the orders: the user's, or a private one that runs as long as the demo.

use std::error::Error;
use std::time::Duration;

use backends::Postgres;
use fraiseql_stream::{Connection, Instruments};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

/// The server with the orders.
pub(crate) struct Server {
    /// Never printed: it may contain a password.
    url: String,
    private: Private,
}

enum Private {
    None,
    Starting(JoinHandle<Result<Postgres, backends::Error>>),
    Running(Postgres),
}

impl Server {
    /// Uses the server of `DATABASE_URL`, or starts a private one in the background if the variable is unset.
    pub(crate) fn from_env() -> Self {
        let url = std::env::var("DATABASE_URL").unwrap_or_default();
        let private =
            if url.is_empty() { Private::Starting(spawn_blocking(Postgres::start)) } else { Private::None };
        Self { url, private }
    }

    /// Describes what [`ready`](Self::ready) waits for.
    pub(crate) fn startup(&self) -> &'static str {
        match self.private {
            Private::None => "connecting to the server of DATABASE_URL",
            _ => "starting a private Postgres",
        }
    }

    /// Returns when the server accepts connections.
    pub(crate) async fn ready(&mut self) -> Result<(), Box<dyn Error + Send + Sync>> {
        if let Private::Starting(starting) = &mut self.private {
            let started = starting.await;
            self.private = Private::None;
            let server = started??;
            self.url = server.url();
            self.private = Private::Running(server);
        }
        Ok(())
    }

    pub(crate) async fn connect(&self, instruments: &Instruments) -> fraiseql_stream::Result<Connection> {
        let builder = Connection::builder(&self.url).instruments(instruments);
        builder.connect().await
    }

    /// Describes where the server comes from.
    pub(crate) fn origin(&self) -> String {
        match &self.private {
            Private::Running(server) => {
                format!("private, on 127.0.0.1:{}; removed at the end", server.port())
            }
            _ => "from DATABASE_URL; only temporary tables are created".to_owned(),
        }
    }

    /// Stops a private server and removes its data.
    pub(crate) async fn stop(&mut self) {
        let running = match std::mem::replace(&mut self.private, Private::None) {
            Private::None => return,
            Private::Running(server) => server,
            // It starts within a second, unless it is still being downloaded: then there is nothing to stop.
            Private::Starting(starting) => match timeout(Duration::from_secs(3), starting).await {
                Ok(Ok(Ok(server))) => server,
                _ => return,
            },
        };
        // The only error is a panic in drop, which the panic hook has already reported.
        let _ = spawn_blocking(move || drop(running)).await;
    }
}
