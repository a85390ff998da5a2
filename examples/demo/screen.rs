//! What the demo prints. A thread of its own does it: a terminal that is stopped, or a pipe that nobody reads,
//! holds up neither the streams nor a Ctrl-C.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::figures::Paint;

/// A line that tells at any moment how things stand.
type Live = Box<dyn FnMut(Paint) -> String + Send>;

enum Message {
    /// Lines that stay.
    Say(Box<dyn FnOnce(Paint) -> String + Send>),
    /// The line to keep up to date from now on, instead of the one before.
    Live(Live),
    /// The live line stays as it is now.
    Settle,
    /// The live line goes.
    Clear,
}

/// Gives work to the thread. Printing goes on until it is dropped.
pub(crate) struct Screen {
    messages: mpsc::Sender<Message>,
    ended: watch::Receiver<()>,
}

impl Screen {
    pub(crate) fn open() -> Self {
        let (messages, inbox) = mpsc::channel();
        let (end, ended) = watch::channel(());
        std::thread::spawn(move || {
            // An error means that nobody reads any more, and so that there is nobody to tell.
            let _ = Printer::new().run(&inbox);
            drop(end);
        });
        Self { messages, ended }
    }

    /// Prints lines that stay.
    pub(crate) fn say(&self, text: impl Into<String>) {
        let text = text.into();
        self.paint(move |_| text);
    }

    /// Prints lines that stay, with colours if there are any.
    pub(crate) fn paint(&self, text: impl FnOnce(Paint) -> String + Send + 'static) {
        self.send(Message::Say(Box::new(text)));
    }

    /// Keeps this line up to date, in place of the live line before.
    pub(crate) fn live(&self, line: impl FnMut(Paint) -> String + Send + 'static) {
        self.send(Message::Live(Box::new(line)));
    }

    /// Lets the live line stay as it is now.
    pub(crate) fn settle(&self) {
        self.send(Message::Settle);
    }

    /// Takes the live line away.
    pub(crate) fn clear(&self) {
        self.send(Message::Clear);
    }

    fn send(&self, message: Message) {
        // Refused once nobody reads; `closed` tells.
        let _ = self.messages.send(message);
    }

    /// Returns when nobody reads what is printed.
    pub(crate) fn closed(&self) -> impl Future<Output = ()> + use<> {
        let mut ended = self.ended.clone();
        // Nothing is ever sent: this waits for the other end to go.
        async move { drop(ended.changed().await) }
    }

    /// Returns when all is printed.
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
    /// When the live line is looked at next, and how often.
    next: Instant,
    every: Duration,
    /// What stands in the live line on a terminal, or was printed of it last.
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
            every: Duration::from_millis(if redraws { 100 } else { 1_000 }),
            shown: String::new(),
        }
    }

    fn run(&mut self, inbox: &mpsc::Receiver<Message>) -> io::Result<()> {
        loop {
            match inbox.recv_timeout(self.next.saturating_duration_since(Instant::now())) {
                Ok(message) => self.obey(message)?,
                Err(RecvTimeoutError::Timeout) => {
                    self.next = Instant::now() + self.every;
                    self.draw()?;
                }
                Err(RecvTimeoutError::Disconnected) => return self.settle(),
            }
        }
    }

    fn obey(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Say(text) => {
                self.settle()?;
                let text = text(self.paint);
                writeln!(self.out, "{text}")?;
                self.out.flush()
            }
            Message::Live(line) => {
                if self.live.is_none() && !self.redraws {
                    // What has only just begun is not worth a line of its own yet.
                    self.next = Instant::now() + self.every;
                }
                self.live = Some(line);
                if self.redraws { self.draw() } else { Ok(()) }
            }
            Message::Settle => self.settle(),
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
            // A line that is longer than the terminal is wide must not wrap, or it could not be taken back.
            write!(self.out, "\r\x1b[K\x1b[?7l{text}\x1b[?7h")?;
        } else {
            writeln!(self.out, "{text}")?;
        }
        self.out.flush()?;
        self.shown = text;
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
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
