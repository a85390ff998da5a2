//! The documents that are streamed, as they are written into the table and as they are read back.

use std::fmt::Write as _;

use serde::Deserialize;

/// An order, as a service would declare it: owned strings, numbers, a nested list.
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
    /// What a consumer makes of an order. It looks at every field, so that none can be optimised away, and the sum over
    /// all rows proves that every peer has decoded the same.
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

/// The text of order `id`, `bytes` long, in the form in which Postgres writes out jsonb. The shortest is about 130 bytes.
pub(crate) fn text(id: u64, bytes: usize) -> String {
    let mut dice = Dice(id);
    let customer = dice.one_of(&CUSTOMERS);
    let status = dice.one_of(&["open", "paid", "shipped"]);
    let total = dice.cents(10_000, 99_999);
    let head = format!(r#"{{"id": {id}, "lines": ["#);
    let tail = format!(r#"], "total": {total}, "status": "{status}", "customer": "{customer}"}}"#);
    let room = bytes.saturating_sub(head.len() + tail.len());
    head + &lines(&mut dice, room) + &tail
}

/// As many lines as `room` holds; the last is made to fill it.
fn lines(dice: &mut Dice, room: usize) -> String {
    const LONGEST: usize = 160;
    let mut text = String::with_capacity(room);
    while room > text.len() + 2 * LONGEST {
        let note = dice.one_of(&NOTES);
        line(&mut text, dice, "", Some(note));
        text.push_str(", ");
    }
    let start = text.len();
    let (qty_and_price, note) = (dice.clone(), dice.one_of(&NOTES));
    line(&mut text, dice, "", None);
    let mut missing = room.saturating_sub(text.len());
    // Too much for an article's number: then it is a remark.
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

fn line(text: &mut String, dice: &mut Dice, padding: &str, note: Option<&str>) {
    let (qty, article) = (dice.between(1, 9), dice.between(100, 999));
    let price = dice.cents(100, 9_999);
    let _ = write!(text, r#"{{"qty": {qty}, "sku": "A{article}{padding}""#);
    if let Some(note) = note {
        let _ = write!(text, r#", "note": "{note}""#);
    }
    let _ = write!(text, r#", "price": {price}}}"#);
}

/// One in eight is not plain ASCII.
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

/// One in eight has an escape in it.
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

/// The same numbers for the same order in every run, and no two orders alike.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn between(&mut self, low: u64, high: u64) -> u64 {
        // SplitMix64.
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
