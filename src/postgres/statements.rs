//! `Statements`: the prepared statements that a connection keeps for further use.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio_postgres::Statement;

use crate::sync::lock;

/// A cache of prepared statements by their text. If it is full, the least recently used one is evicted.
#[derive(Debug)]
pub(crate) struct Statements {
    capacity: usize,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    by_text: HashMap<Arc<str>, Entry>,
    /// The number of uses so far, which orders entries by their last use.
    uses: u64,
}

#[derive(Debug)]
struct Entry {
    statement: Statement,
    last_use: u64,
}

impl Statements {
    /// Creates a cache of at most `capacity` statements.
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, entries: Mutex::default() }
    }

    /// Returns the statement with this text and marks it as used.
    pub(super) fn get(&self, text: &str) -> Option<Statement> {
        let mut entries = lock(&self.entries);
        entries.uses += 1;
        let now = entries.uses;
        let entry = entries.by_text.get_mut(text)?;
        entry.last_use = now;
        Some(entry.statement.clone())
    }

    /// Adds a statement. Does nothing if the capacity is 0.
    pub(super) fn insert(&self, text: &str, statement: &Statement) {
        if self.capacity == 0 {
            return;
        }
        let mut entries = lock(&self.entries);
        entries.uses += 1;
        let last_use = entries.uses;
        let replaced = entries.by_text.remove(text);
        let evicted = if entries.by_text.len() < self.capacity { None } else { entries.evict() };
        entries.by_text.insert(Arc::from(text), Entry { statement: statement.clone(), last_use });
        drop(entries);
        // Dropping a statement closes it on the server, which needs no lock.
        drop((replaced, evicted));
    }

    /// Removes the statement with this text, if there is one.
    pub(super) fn remove(&self, text: &str) {
        let removed = lock(&self.entries).by_text.remove(text);
        drop(removed);
    }
}

impl Entries {
    /// Removes and returns the least recently used statement.
    fn evict(&mut self) -> Option<Entry> {
        let oldest = self.by_text.iter().min_by_key(|(_, entry)| entry.last_use)?;
        let text = Arc::clone(oldest.0);
        self.by_text.remove(&text)
    }
}
