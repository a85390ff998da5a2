use super::*;
use crate::channel::clock::manual;

const MS: Nanos = 1_000_000;
const S: Nanos = 1_000_000_000;

/// A ledger whose clock and watchdog the test moves.
struct Test {
    ledger: Ledger,
    hand: Arc<AtomicU64>,
    before: [AtomicU64; STATES],
}

impl Test {
    fn new() -> Self {
        let (clock, hand) = manual();
        let watchdog = Arc::new(Watchdog::new(clock.clone(), true));
        watchdog.stream_begins();
        let ledger = Ledger::new(clock, watchdog);
        ledger.evidence.give_no_benefit_of_the_doubt(true);
        Self { ledger, hand, before: Default::default() }
    }

    fn at(&self, now: Nanos) {
        self.hand.store(now, Ordering::Relaxed);
    }

    fn turn(&self) {
        // A turn never runs in the moment in which it is asked for.
        self.hand.fetch_add(1, Ordering::Relaxed);
        self.ledger.watchdog().turn_now();
    }

    /// The times in milliseconds.
    fn read(&self) -> [Nanos; STATES] {
        self.ledger.read().consumer.map(|time| (time + MS / 2) / MS)
    }

    /// Makes the runtime late several times up to 100 ms.
    fn suspect(&self) {
        for ms in [0, 40, 70, 100] {
            self.at(ms * MS);
            self.turn();
        }
        assert!(self.ledger.watchdog().is_alert(100 * MS));
        self.ledger.wait(100 * MS);
        self.ledger.rows_arrived();
        self.ledger.take(ConsumerState::Overlap, 100 * MS);
        self.turn();
        self.before.iter().zip(self.read()).for_each(|(slot, sum)| slot.store(sum, Ordering::Relaxed));
    }

    fn since_suspect(&self) -> [Nanos; STATES] {
        let now = self.read();
        std::array::from_fn(|i| now[i] - self.before[i].load(Ordering::Relaxed))
    }
}

fn ledger() -> (Ledger, Arc<AtomicU64>) {
    let (clock, hand) = manual();
    let watchdog = Arc::new(Watchdog::new(clock.clone(), true));
    (Ledger::new(clock, watchdog), hand)
}

#[test]
fn the_first_doubts_are_not_held_against_the_consumer() {
    let test = Test::new();
    test.ledger.evidence.give_no_benefit_of_the_doubt(false);
    for turn in 0..4 {
        let start = turn * 50 * MS;
        test.at(start);
        test.turn();
        test.ledger.wait(start);
        // It looks as if the task that polls had the thread all the time.
        test.at(start + 40 * MS);
        test.ledger.wait(start);
        test.turn();
        test.ledger.rows_arrived();
        test.ledger.take(ConsumerState::Overlap, start + 40 * MS);
    }
    let [_, scheduled, _, backlog, _] = test.read();
    assert!(scheduled >= 60 && backlog >= 30, "{scheduled}, {backlog}");
}

#[test]
fn a_wait_is_counted_before_it_ends() {
    let (ledger, hand) = ledger();
    ledger.enter_consumer(ConsumerState::SourceWait, 0);
    hand.store(3_600 * S, Ordering::Relaxed);
    assert_eq!(ledger.read().of(ConsumerState::SourceWait), 3_600 * S);
    assert_eq!(ledger.read().producer, [3_600 * S, 0]);
}

#[test]
fn the_states_of_each_half_add_up_to_its_lifetime() {
    let (ledger, hand) = ledger();
    ledger.enter_consumer(ConsumerState::SourceWait, 10 * MS);
    ledger.enter_consumer(ConsumerState::Scheduled, 15 * MS);
    ledger.enter_consumer(ConsumerState::Backlog, 16 * MS);
    ledger.enter_producer(ProducerState::Room, 20 * MS);
    ledger.enter_consumer(ConsumerState::Paused, 40 * MS);
    hand.store(50 * MS, Ordering::Relaxed);
    ledger.end_producer();
    hand.store(70 * MS, Ordering::Relaxed);
    let times = ledger.read();
    assert_eq!(times.consumer, [5 * MS, MS, 10 * MS, 24 * MS, 30 * MS]);
    assert_eq!(times.producer, [20 * MS, 30 * MS]);
    assert_eq!(times.at, 70 * MS);
    ledger.end_consumer();
    hand.store(90 * MS, Ordering::Relaxed);
    assert_eq!(ledger.read().at, 70 * MS, "the sums stand still after the end");
}

fn until(holds: impl Fn() -> bool) {
    while !holds() {
        std::thread::yield_now();
    }
}

/// Reads a ledger until it has ended; the longest life seen before.
fn longest_life(ledger: &Ledger, reads: &AtomicU64) -> Nanos {
    let mut longest = 0;
    while !ledger.is_ended() {
        longest = ledger.read().at.max(longest);
        add(reads, 1);
    }
    longest
}

#[test]
fn no_reader_sees_a_life_longer_than_it_is_at_its_end() {
    let clock = Clock::start();
    let watchdog = Arc::new(Watchdog::new(clock.clone(), false));
    for _ in 0..500 {
        let ledger = Ledger::new(clock.clone(), Arc::clone(&watchdog));
        let reads = AtomicU64::new(0);
        let longest = std::thread::scope(|scope| {
            let reader = scope.spawn(|| longest_life(&ledger, &reads));
            until(|| reads.load(Ordering::Relaxed) >= 3);
            ledger.end_consumer();
            reader.join().unwrap_or(Nanos::MAX)
        });
        assert!(ledger.read().at >= longest, "{} after {longest}", ledger.read().at);
    }
}

#[test]
fn a_wait_with_a_late_turn_belongs_to_the_runtime_from_2_ms_before_the_turn_was_due() {
    let test = Test::new();
    test.turn(); // the next is due at 10 ms
    test.ledger.wait(0);
    test.at(30 * MS);
    let running = test.read();
    assert_eq!(running, [8, 22, 0, 0, 0], "late from 2 ms before the turn was due");
    test.turn();
    test.ledger.rows_arrived();
    assert_eq!(test.read(), running);
}

#[test]
fn a_turn_that_runs_in_time_proves_that_the_runtime_is_not_late() {
    let test = Test::new();
    test.turn();
    test.ledger.wait(0);
    for ms in [11, 22, 33] {
        test.at(ms * MS);
        test.turn();
    }
    assert_eq!(test.read(), [33, 0, 0, 0, 0]);
}

#[test]
fn a_woken_consumer_that_lets_rows_wait_is_busy_unless_the_runtime_was_late() {
    let test = Test::new();
    test.turn();
    test.ledger.wait(0);
    test.at(MS);
    test.ledger.rows_arrived();
    test.at(9 * MS);
    assert!(test.ledger.take(ConsumerState::Overlap, 9 * MS), "it let rows wait");
    assert_eq!(test.read(), [1, 0, 0, 8, 0]);

    test.ledger.wait(9 * MS);
    test.turn();
    test.ledger.rows_arrived();
    test.at(39 * MS);
    test.turn();
    test.ledger.take(ConsumerState::Overlap, 39 * MS);
    assert_eq!(test.read(), [1, 30, 0, 8, 0], "the turn ran only then");
}

#[test]
fn a_consumer_that_takes_rows_within_half_a_millisecond_takes_them_at_once() {
    let test = Test::new();
    test.ledger.wait(0);
    test.ledger.rows_arrived();
    test.at(AT_ONCE);
    assert!(!test.ledger.take(ConsumerState::Overlap, AT_ONCE));
    assert_eq!(test.read(), [1, 0, 0, 0, 0]);
}

#[test]
fn a_poll_while_a_turn_is_overdue_was_late_itself() {
    let test = Test::new();
    test.turn();
    test.ledger.wait(0);
    test.at(40 * MS);
    // The task that polls had the thread all the time.
    test.ledger.wait(0);
    test.turn();
    test.at(41 * MS);
    test.ledger.rows_arrived();
    assert_eq!(test.read(), [9, 0, 0, 32, 0], "rows arrived at once, so they had been there");
}

#[test]
fn rows_that_do_not_arrive_at_once_had_not_been_there() {
    let test = Test::new();
    test.turn();
    test.ledger.wait(0);
    test.at(40 * MS);
    test.ledger.wait(0);
    test.turn();
    for ms in [42, 44, 46] {
        test.at(ms * MS);
        test.turn();
    }
    test.ledger.rows_arrived();
    assert_eq!(test.read(), [14, 0, 32, 0, 0]);
}

#[test]
fn while_the_runtime_is_suspect_a_waiting_consumer_is_busy_until_it_yields_the_thread() {
    let test = Test::new();
    test.suspect();
    // Its task runs for another 20 ms after the poll; then the turn runs that it asked for.
    test.ledger.wait(100 * MS + 2);
    test.at(120 * MS);
    test.turn();
    test.ledger.rows_arrived();
    assert_eq!(test.since_suspect(), [0, 0, 0, 20, 0]);
    test.ledger.take(ConsumerState::Overlap, 120 * MS);

    // It yields at once, and then others have the thread.
    test.ledger.wait(120 * MS);
    test.turn();
    test.at(140 * MS);
    test.ledger.rows_arrived();
    test.ledger.take(ConsumerState::Overlap, 140 * MS);
    assert_eq!(test.since_suspect(), [0, 20, 0, 20, 0]);
}

#[test]
fn while_the_runtime_is_suspect_rows_ask_for_a_turn_just_before_the_consumers() {
    let test = Test::new();
    test.suspect();
    test.ledger.wait(100 * MS);
    test.turn();
    test.at(100 * MS + 2);
    test.ledger.rows_arrived();
    test.at(105 * MS);
    test.turn();
    test.at(120 * MS);
    // The 5 ms until the turn are the runtime's, the rest is its own task's.
    test.ledger.take(ConsumerState::Overlap, 120 * MS);
    assert_eq!(test.since_suspect(), [0, 5, 0, 15, 0]);
}

#[test]
fn decoding_never_exceeds_the_time_in_which_rows_were_held() {
    let (ledger, hand) = ledger();
    hand.store(MS, Ordering::Relaxed);
    ledger.decoded(5 * MS);
    assert_eq!(ledger.read().decode, MS);
}

#[test]
fn the_window_covers_the_last_ten_seconds_only() {
    let (ledger, hand) = ledger();
    // A minute of waiting, then half a minute of backlog, in steps of a second.
    for second in 0..60 {
        ledger.enter_consumer(ConsumerState::SourceWait, second * S);
    }
    for second in 60..90 {
        ledger.enter_consumer(ConsumerState::Backlog, second * S);
    }
    hand.store(90 * S, Ordering::Relaxed);
    let (now, then) = (ledger.read(), ledger.read_window_start());
    assert_eq!(now.of(ConsumerState::Backlog) - then[ConsumerState::Backlog as usize], 10 * S);
    assert_eq!(now.of(ConsumerState::SourceWait), then[ConsumerState::SourceWait as usize]);
}

#[test]
fn the_window_moves_on_while_nothing_changes() {
    let (ledger, hand) = ledger();
    ledger.enter_consumer(ConsumerState::Backlog, 0);
    ledger.enter_consumer(ConsumerState::SourceWait, 5 * S);
    hand.store(500 * S, Ordering::Relaxed);
    let (now, then) = (ledger.read(), ledger.read_window_start());
    assert_eq!(now.of(ConsumerState::SourceWait) - then[ConsumerState::SourceWait as usize], 10 * S);
    assert_eq!(now.of(ConsumerState::Backlog), then[ConsumerState::Backlog as usize]);
}
