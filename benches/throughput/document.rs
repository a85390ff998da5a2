//! The documents that are streamed: their text in the table, and the type they are decoded into.

use std::fmt::Write as _;

use serde::Deserialize;

/// An order as a service would declare it: owned strings, numbers, and a nested list.
#[derive(Debug, Deserialize)]
pub(crate) struct Order {
    id: u64,
    status: Status,
    customer: String,
    total: f64,
    lines: Vec<Line>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Open,
    Paid,
    Shipped,
}

#[derive(Debug, Deserialize)]
struct Line {
    sku: String,
    qty: u32,
    price: f64,
    note: Option<String>,
}

impl Order {
    /// Returns a checksum over all fields, so that none can be optimised away. The sum over all rows proves that every
    /// peer decoded the same values.
    pub(crate) fn checksum(&self) -> u64 {
        let lines = self.lines.iter().map(|line| {
            let note = line.note.as_deref().map_or(0, str::len);
            u64::from(line.qty) + line.price.to_bits() % 1009 + (line.sku.len() + note) as u64
        });
        self.id
            + self.status as u64
            + self.customer.len() as u64
            + self.total.to_bits() % 1009
            + lines.sum::<u64>()
    }
}

/// Returns the text of order `id`, formatted as Postgres prints jsonb and about `bytes` long, but at least 130 bytes.
pub(crate) fn text(id: u64, bytes: usize) -> String {
    let mut random = Random(id);
    let customer = random.one_of(&CUSTOMERS);
    let status = random.one_of(&["open", "paid", "shipped"]);
    let total = random.cents(10_000, 99_999);
    let head = format!(r#"{{"id": {id}, "lines": ["#);
    let tail = format!(r#"], "total": {total}, "status": "{status}", "customer": "{customer}"}}"#);
    let room = bytes.saturating_sub(head.len() + tail.len());
    head + &lines(&mut random, room) + &tail
}

/// Returns as many lines as fit into `room` bytes; the last one is padded to fill it.
fn lines(random: &mut Random, room: usize) -> String {
    const LONGEST: usize = 160;
    let mut text = String::with_capacity(room);
    while room > text.len() + 2 * LONGEST {
        let note = random.one_of(&NOTES);
        line(&mut text, random, "", Some(note));
        text.push_str(", ");
    }
    let start = text.len();
    let (qty_and_price, note) = (random.clone(), random.one_of(&NOTES));
    line(&mut text, random, "", None);
    let mut missing = room.saturating_sub(text.len());
    // Much padding would make an unrealistic article number, so a note takes up most of it.
    let note = (missing > 40).then_some(note);
    let mut padding = String::new();
    for _ in 0..2 {
        text.truncate(start);
        line(&mut text, &mut qty_and_price.clone(), &padding, note);
        missing = room.saturating_sub(text.len());
        padding.extend(std::iter::repeat_n('7', missing));
    }
    text
}

fn line(text: &mut String, random: &mut Random, padding: &str, note: Option<&str>) {
    let (qty, article) = (random.between(1, 9), random.between(100, 999));
    let price = random.cents(100, 9_999);
    let _ = write!(text, r#"{{"qty": {qty}, "sku": "A{article}{padding}""#);
    if let Some(note) = note {
        let _ = write!(text, r#", "note": "{note}""#);
    }
    let _ = write!(text, r#", "price": {price}}}"#);
}

/// One in eight contains non-ASCII characters.
const CUSTOMERS: [&str; 8] = [
    "Ada Lovelace",
    "Alan Turing",
    "Grace Hopper",
    "Edsger Dijkstra",
    "Zoë Müller",
    "Barbara Liskov",
    "Donald Knuth",
    "Leslie Lamport",
];

/// One in eight contains an escape.
const NOTES: [&str; 8] = [
    "leave at the back door, ring twice",
    "gift wrap, no invoice in the parcel",
    "call before delivery",
    "replacement for a damaged article",
    "engrave \\\"for Ada\\\" on the lid",
    "ship with the rest of the order if it is not late",
    "second address on the list",
    "fragile",
];

/// A random number generator (`SplitMix64`) seeded with the order's id, so that every run has the same orders.
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn between(&mut self, low: u64, high: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        low + (z ^ (z >> 31)) % (high - low + 1)
    }

    fn cents(&mut self, low: u64, high: u64) -> String {
        let cents = self.between(low, high);
        format!("{}.{:02}", cents / 100, cents % 100)
    }

    fn one_of<T: Copy>(&mut self, choice: &[T]) -> T {
        let last = choice.len() as u64 - 1;
        choice[usize::try_from(self.between(0, last)).unwrap_or_default()]
    }
}
