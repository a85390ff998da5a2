//! Prints the demo's output on a dedicated thread, so that a stopped terminal or an unread pipe blocks neither the
//! streams nor Ctrl-C.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::figures::Paint;

/// Formats the live line from the current state.
type Live = Box<dyn FnMut(Paint) -> String + Send>;

enum Message {
    /// Prints lines that stay.
    Print(Box<dyn FnOnce(Paint) -> String + Send>),
    /// Replaces the live line and keeps it up to date.
    Live(Live),
    /// Updates the live line once more, then leaves it in place.
    Freeze,
    /// Removes the live line.
    Clear,
}

/// A handle to the printing thread, which ends when the handle is dropped and everything is printed.
pub(crate) struct Screen {
    messages: mpsc::Sender<Message>,
    ended: watch::Receiver<()>,
}

impl Screen {
    pub(crate) fn open() -> Self {
        let (messages, inbox) = mpsc::channel();
        let (end, ended) = watch::channel(());
        std::thread::spawn(move || {
            // An error means that the output is closed: there is nowhere to report it.
            let _ = Printer::new().run(&inbox);
            drop(end);
        });
        Self { messages, ended }
    }

    /// Prints lines that stay.
    pub(crate) fn print(&self, text: impl Into<String>) {
        let text = text.into();
        self.print_with(move |_| text);
    }

    /// Prints lines that stay, in colour if the terminal has colours.
    pub(crate) fn print_with(&self, text: impl FnOnce(Paint) -> String + Send + 'static) {
        self.send(Message::Print(Box::new(text)));
    }

    /// Shows a live line and keeps it up to date; it replaces the previous one.
    pub(crate) fn live(&self, line: impl FnMut(Paint) -> String + Send + 'static) {
        self.send(Message::Live(Box::new(line)));
    }

    /// Updates the live line once more, then leaves it in place.
    pub(crate) fn freeze(&self) {
        self.send(Message::Freeze);
    }

    /// Removes the live line.
    pub(crate) fn clear(&self) {
        self.send(Message::Clear);
    }

    fn send(&self, message: Message) {
        // Sending fails once the output is closed; `closed` reports that.
        let _ = self.messages.send(message);
    }

    /// Returns when the reader has closed the output.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let mut ended = self.ended.clone();
        // Nothing is ever sent, so this waits until the thread drops its end.
        async move { drop(ended.changed().await) }
    }

    /// Returns when everything is printed.
    pub(crate) async fn close(self) {
        let Self { messages, mut ended } = self;
        drop(messages);
        let _ = ended.changed().await;
    }
}

struct Printer {
    out: io::Stdout,
    paint: Paint,
    /// Whether the live line can be redrawn in place.
    redraws: bool,
    live: Option<Live>,
    /// The time of the next update of the live line, and the interval between updates.
    next: Instant,
    interval: Duration,
    /// The live line as it was last printed.
    shown: String,
}

impl Printer {
    fn new() -> Self {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let dumb = set("TERM").is_none_or(|term| term == "dumb");
        let redraws = io::stdout().is_terminal() && !dumb;
        Self {
            out: io::stdout(),
            paint: Paint { colour: redraws && set("NO_COLOR").is_none() },
            redraws,
            live: None,
            next: Instant::now(),
            interval: Duration::from_millis(if redraws { 100 } else { 1_000 }),
            shown: String::new(),
        }
    }

    fn run(&mut self, inbox: &mpsc::Receiver<Message>) -> io::Result<()> {
        loop {
            match inbox.recv_timeout(self.next.saturating_duration_since(Instant::now())) {
                Ok(message) => self.handle(message)?,
                Err(RecvTimeoutError::Timeout) => {
                    self.next = Instant::now() + self.interval;
                    self.draw()?;
                }
                Err(RecvTimeoutError::Disconnected) => return self.freeze(),
            }
        }
    }

    fn handle(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Print(text) => {
                self.freeze()?;
                let text = text(self.paint);
                writeln!(self.out, "{text}")?;
                self.out.flush()
            }
            Message::Live(line) => {
                if self.live.is_none() && !self.redraws {
                    // Without redrawing, each update costs a line: skip the first one, which would show no progress.
                    self.next = Instant::now() + self.interval;
                }
                self.live = Some(line);
                if self.redraws { self.draw() } else { Ok(()) }
            }
            Message::Freeze => self.freeze(),
            Message::Clear => {
                self.live = None;
                self.erase()
            }
        }
    }

    fn draw(&mut self) -> io::Result<()> {
        let Some(live) = &mut self.live else {
            return Ok(());
        };
        let text = live(self.paint);
        if text == self.shown {
            return Ok(());
        }
        if self.redraws {
            // Line wrapping is turned off, since a wrapped line could not be erased.
            write!(self.out, "\r\x1b[K\x1b[?7l{text}\x1b[?7h")?;
        } else {
            writeln!(self.out, "{text}")?;
        }
        self.out.flush()?;
        self.shown = text;
        Ok(())
    }

    fn freeze(&mut self) -> io::Result<()> {
        self.draw()?;
        self.live = None;
        if self.redraws && !self.shown.is_empty() {
            writeln!(self.out)?;
        }
        self.shown.clear();
        Ok(())
    }

    fn erase(&mut self) -> io::Result<()> {
        if self.redraws && !self.shown.is_empty() {
            write!(self.out, "\r\x1b[K")?;
        }
        self.shown.clear();
        Ok(())
    }
}
