//! A proxy in front of the server that records the messages of its clients.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use crate::server::{Database, shared};

#[derive(Debug)]
pub(crate) struct Proxy {
    port: u16,
    recorded: Recorded,
}

/// The type bytes of messages: `P` for Parse, `B` for Bind, and so on. Each `S`, for Sync, is a round trip.
type Recorded = Arc<Mutex<String>>;

impl Proxy {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Self { port: listener.local_addr().unwrap().port(), recorded: Recorded::default() };
        let recorded = Arc::clone(&proxy.recorded);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                connect(client, &recorded).await;
            }
        });
        proxy
    }

    /// Returns the connection string of a database through the proxy.
    pub(crate) fn url(&self, database: &Database) -> String {
        database.url.replace(&format!(":{}/", shared().port()), &format!(":{}/", self.port))
    }

    /// Returns the messages since the last call that the server may have answered.
    pub(crate) fn take_messages(&self) -> String {
        std::mem::take(&mut *self.recorded.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn connect(client: TcpStream, recorded: &Recorded) {
    let server = TcpStream::connect(("127.0.0.1", shared().port())).await.unwrap();
    let ((from_client, mut to_client), (mut from_server, to_server)) =
        (client.into_split(), server.into_split());
    tokio::spawn(forward(from_client, to_server, Arc::clone(recorded)));
    tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
}

async fn forward(
    mut client: OwnedReadHalf,
    mut server: OwnedWriteHalf,
    recorded: Recorded,
) -> std::io::Result<()> {
    // The first message has no type byte.
    let mut message_type = None;
    loop {
        let length = client.read_u32().await?;
        let mut body = vec![0; usize::try_from(length).unwrap() - 4];
        client.read_exact(&mut body).await?;
        // Recorded before it is sent, and therefore before it is answered.
        recorded.lock().unwrap_or_else(PoisonError::into_inner).extend(message_type.map(char::from));
        let head = message_type.into_iter().chain(length.to_be_bytes());
        server.write_all(&head.chain(body).collect::<Vec<u8>>()).await?;
        message_type = Some(client.read_u8().await?);
    }
}
