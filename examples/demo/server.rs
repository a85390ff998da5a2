//! The server that the orders are in: the user's, or one that lives as long as the demo.

use std::error::Error;
use std::time::Duration;

use backends::Postgres;
use fraiseql_stream::{Connection, Instruments};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::timeout;

/// Where the orders are.
pub(crate) struct Server {
    /// May hold a password: never printed.
    url: String,
    private: Private,
}

enum Private {
    None,
    Starting(JoinHandle<Result<Postgres, backends::Error>>),
    Running(Postgres),
}

impl Server {
    /// The server of `DATABASE_URL`, or else a private one, which begins to start.
    pub(crate) fn choose() -> Self {
        let url = std::env::var("DATABASE_URL").unwrap_or_default();
        let private =
            if url.is_empty() { Private::Starting(spawn_blocking(Postgres::start)) } else { Private::None };
        Self { url, private }
    }

    /// What comes first, in words.
    pub(crate) fn plan(&self) -> &'static str {
        match self.private {
            Private::None => "connecting to the Postgres of DATABASE_URL",
            _ => "starting a private Postgres",
        }
    }

    /// Returns when it takes connections.
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

    /// Whose it is, in words.
    pub(crate) fn owner(&self) -> String {
        match &self.private {
            Private::Running(server) => {
                format!("private, on 127.0.0.1:{}; gone at the end", server.port())
            }
            _ => "that of DATABASE_URL; all made there is temporary".to_owned(),
        }
    }

    /// Stops a private server and removes its data.
    pub(crate) async fn stop(&mut self) {
        let running = match std::mem::replace(&mut self.private, Private::None) {
            Private::None => return,
            Private::Running(server) => server,
            // It is there within a second, or it is being fetched: then there is nothing to stop yet.
            Private::Starting(starting) => match timeout(Duration::from_secs(3), starting).await {
                Ok(Ok(Ok(server))) => server,
                _ => return,
            },
        };
        // An error would be a panic in its drop, which has been told by then.
        let _ = spawn_blocking(move || drop(running)).await;
    }
}
