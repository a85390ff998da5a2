//! Writing to a pipe, a terminal or a file without blocking the runtime.

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

/// Standard output or standard error, written by a dedicated thread, so that a stalled reader blocks only that
/// thread. (Non-blocking mode is no alternative: it would apply to every process that shares the pipe or terminal.)
///
/// Uses two buffers: one is filled while the other is written.
pub(crate) struct Sink {
    filling: Vec<u8>,
    /// The other buffer; `None` while it is being written.
    spare: Option<Vec<u8>>,
    full: mpsc::Sender<Vec<u8>>,
    written: UnboundedReceiver<Written>,
}

/// An emptied buffer, and the result of writing its contents.
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

    /// Appends `text` as one line. Line breaks become spaces: in JSON, they occur only between tokens.
    pub(crate) fn line(&mut self, text: &[u8]) {
        let start = self.filling.len();
        self.filling.extend_from_slice(text);
        if text.contains(&b'\n') || text.contains(&b'\r') {
            let breaks = self.filling[start..].iter_mut().filter(|byte| matches!(byte, b'\n' | b'\r'));
            breaks.for_each(|byte| *byte = b' ');
        }
        self.filling.push(b'\n');
    }

    /// Returns whether enough lines have been collected to be worth a write.
    pub(crate) fn is_full(&self) -> bool {
        self.filling.len() >= Self::SIZE
    }

    /// Passes the lines to the writer thread once it is idle. Cancel safe.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        if self.filling.is_empty() {
            return Ok(());
        }
        self.wait_idle().await?;
        if let Some(spare) = self.spare.take() {
            let lines = std::mem::replace(&mut self.filling, spare);
            self.full.send(lines).map_err(|_| writer_gone())?;
        }
        Ok(())
    }

    /// Waits until all lines have been written. Cancel safe.
    pub(crate) async fn finish(&mut self) -> io::Result<()> {
        self.flush().await?;
        self.wait_idle().await
    }

    async fn wait_idle(&mut self) -> io::Result<()> {
        if self.spare.is_none() {
            let (buffer, result) = self.written.recv().await.ok_or_else(writer_gone)?;
            self.spare = Some(buffer);
            return result;
        }
        Ok(())
    }
}

fn writer_gone() -> io::Error {
    io::Error::other("the writer thread has ended")
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
            // Another process that shares the descriptor has made it non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Waits until the reader has closed standard output. If that cannot be detected (as with files), never returns.
pub(crate) async fn reader_gone() {
    #[expect(deprecated, reason = "sound for a descriptor that is never closed; its replacement is unsafe")]
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
