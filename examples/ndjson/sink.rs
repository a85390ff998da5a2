//! Writing to what may stall or break: a pipe, a terminal, a file.

use std::fs::File;
use std::future::pending;
use std::io::{self, ErrorKind, Write as _};
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Standard output or standard error, written by a thread of its own: when the reader stalls, only that thread
/// does. (A non-blocking write would need a mode that all share who hold the same pipe or terminal.)
///
/// There are two buffers, one to fill and one that is being written.
pub(crate) struct Sink {
    filling: Vec<u8>,
    /// The other buffer, unless it is being written.
    spare: Option<Vec<u8>>,
    full: mpsc::Sender<Vec<u8>>,
    written: UnboundedReceiver<Written>,
}

/// A buffer that comes back empty, and what became of its bytes.
type Written = (Vec<u8>, io::Result<()>);

impl Sink {
    const SIZE: usize = 64 * 1024;

    pub(crate) fn new(target: impl AsFd) -> io::Result<Self> {
        let target = File::from(target.as_fd().try_clone_to_owned()?);
        let (full, to_write) = mpsc::channel();
        let (done, written) = unbounded_channel();
        thread::Builder::new().name("writer".to_owned()).spawn(move || write(&target, &to_write, &done))?;
        Ok(Self { filling: Vec::new(), spare: Some(Vec::new()), full, written })
    }

    /// Adds a line. Whatever breaks a line in `text` becomes a space: in JSON it stands between tokens only.
    pub(crate) fn line(&mut self, text: &[u8]) {
        let start = self.filling.len();
        self.filling.extend_from_slice(text);
        if text.contains(&b'\n') || text.contains(&b'\r') {
            let breaks = self.filling[start..].iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r'));
            breaks.for_each(|byte| *byte = b' ');
        }
        self.filling.push(b'\n');
    }

    /// Enough lines wait to be worth a write.
    pub(crate) fn is_full(&self) -> bool {
        self.filling.len() >= Self::SIZE
    }

    /// Hands the lines to the thread, as soon as it has nothing else to write. Cancel safe.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        if self.filling.is_empty() {
            return Ok(());
        }
        self.idle().await?;
        if let Some(spare) = self.spare.take() {
            let lines = std::mem::replace(&mut self.filling, spare);
            self.full.send(lines).map_err(|_| gone())?;
        }
        Ok(())
    }

    /// Waits until all lines are written. Cancel safe.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        self.flush().await?;
        self.idle().await
    }

    async fn idle(&mut self) -> io::Result<()> {
        if self.spare.is_none() {
            let (buffer, result) = self.written.recv().await.ok_or_else(gone)?;
            self.spare = Some(buffer);
            return result;
        }
        Ok(())
    }
}

fn gone() -> io::Error {
    io::Error::other("the writing thread is gone")
}

fn write(target: &File, full: &mpsc::Receiver<Vec<u8>>, written: &UnboundedSender<Written>) {
    while let Ok(mut lines) = full.recv() {
        let result = write_all(target, &lines);
        lines.clear();
        if written.send((lines, result)).is_err() {
            return;
        }
    }
}

fn write_all(mut target: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match target.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Somebody with whom we share it has made it non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until nobody can read our output any more. Where that cannot be told (files), it waits for ever.
pub(crate) async fn reader_gone() {
    #[expect(deprecated, reason = "sound for a descriptor that is never closed; what replaces it is unsafe")]
    let output = AsyncFd::with_interest(io::stdout(), Interest::WRITABLE);
    if let Ok(output) = output {
        while let Ok(mut state) = output.writable().await {
            if state.ready().is_write_closed() {
                return;
            }
            state.clear_ready();
        }
    }
    pending::<()>().await;
}
