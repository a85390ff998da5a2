//! A way to the server on which the messages of its clients are noted.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use crate::server::{Database, shared};

#[derive(Debug)]
pub(crate) struct Proxy {
    port: u16,
    noted: Noted,
}

/// The letters of messages: `P` for Parse, `B` for Bind, and so on. Each `S`, for Sync, is a round trip.
type Noted = Arc<Mutex<String>>;

impl Proxy {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let noted = Noted::default();
        tokio::spawn(accept_all(listener, Arc::clone(&noted)));
        Self { port, noted }
    }

    /// The connection string of a database by this way.
    pub(crate) fn url(&self, database: &Database) -> String {
        database.url.replace(&format!(":{}/", shared().port()), &format!(":{}/", self.port))
    }

    /// The messages since the last call that the server may have answered.
    pub(crate) fn messages(&self) -> String {
        std::mem::take(&mut *self.noted.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn accept_all(listener: TcpListener, noted: Noted) {
    while let Ok((client, _)) = listener.accept().await {
        let server = TcpStream::connect(("127.0.0.1", shared().port())).await.unwrap();
        let ((from_client, mut to_client), (mut from_server, to_server)) =
            (client.into_split(), server.into_split());
        tokio::spawn(forward(from_client, to_server, Arc::clone(&noted)));
        tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
    }
}

async fn forward(mut client: OwnedReadHalf, mut server: OwnedWriteHalf, noted: Noted) -> std::io::Result<()> {
    // The first message has no letter.
    let mut letter = None;
    loop {
        let length = client.read_u32().await?;
        let mut body = vec![0; usize::try_from(length).unwrap() - 4];
        client.read_exact(&mut body).await?;
        // Noted before it is sent, and so before it is answered.
        noted.lock().unwrap_or_else(PoisonError::into_inner).extend(letter.map(char::from));
        let head = letter.into_iter().chain(length.to_be_bytes());
        server.write_all(&head.chain(body).collect::<Vec<u8>>()).await?;
        letter = Some(client.read_u8().await?);
    }
}
