use super::*;
use crate::channel::clock::manual;

const MS: Nanos = 1_000_000;
const S: Nanos = 1_000_000_000;

/// A ledger of a stream on a runtime with one thread. The test sets the clock and runs the turns of the watchdog.
struct Fixture {
    ledger: Ledger,
    clock: Arc<AtomicU64>,
}

impl Fixture {
    fn new() -> Self {
        let (clock, now) = manual();
        let watchdog = Arc::new(Watchdog::new(clock.clone(), true));
        watchdog.stream_begins();
        let ledger = Ledger::new(clock, watchdog);
        ledger.evidence.attribute_doubts_to_consumer(true);
        Self { ledger, clock: now }
    }

    /// A consumer that waits from the start. The next turn is due at 10 ms.
    fn waiting() -> Self {
        let fixture = Self::new();
        fixture.turn();
        fixture.ledger.record_empty_poll(0);
        fixture
    }

    /// A consumer that waits from the start. Its second poll and the overdue turn run at 40 ms only, so the task that
    /// polls may have blocked the thread until then.
    fn polled_while_a_turn_was_overdue() -> Self {
        let fixture = Self::waiting();
        fixture.at(40 * MS);
        fixture.ledger.record_empty_poll(0);
        fixture.turn();
        fixture
    }

    /// A runtime that is suspect because several turns up to 100 ms ran late.
    fn suspect() -> Self {
        let fixture = Self::new();
        for ms in [0, 40, 70, 100] {
            fixture.at(ms * MS);
            fixture.turn();
        }
        assert!(fixture.ledger.watchdog().is_alert(100 * MS));
        fixture.ledger.record_empty_poll(100 * MS);
        fixture.ledger.record_arrival();
        fixture.ledger.record_take(ConsumerState::Overlap, 100 * MS);
        fixture.turn();
        fixture
    }

    fn at(&self, now: Nanos) {
        self.clock.store(now, Ordering::Relaxed);
    }

    fn turn(&self) {
        // A turn never runs at the moment at which it is requested.
        self.clock.fetch_add(1, Ordering::Relaxed);
        self.ledger.watchdog().turn_now();
    }

    /// Returns the consumer's times in milliseconds.
    fn times(&self) -> [Nanos; CONSUMER_STATES] {
        self.ledger.read().consumer.map(|time| (time + MS / 2) / MS)
    }

    /// Returns the consumer's times since `before`, in milliseconds.
    fn times_since(&self, before: [Nanos; CONSUMER_STATES]) -> [Nanos; CONSUMER_STATES] {
        let now = self.times();
        std::array::from_fn(|i| now[i] - before[i])
    }
}

fn ledger() -> (Ledger, Arc<AtomicU64>) {
    let (clock, now) = manual();
    let watchdog = Arc::new(Watchdog::new(clock.clone(), true));
    (Ledger::new(clock, watchdog), now)
}

#[test]
fn the_first_delays_in_doubt_are_not_attributed_to_the_consumer() {
    let fixture = Fixture::new();
    fixture.ledger.evidence.attribute_doubts_to_consumer(false);
    for round in 0..4 {
        let start = round * 50 * MS;
        fixture.at(start);
        fixture.turn();
        fixture.ledger.record_empty_poll(start);
        // It looks as if the task that polls had blocked the thread all the time.
        fixture.at(start + 40 * MS);
        fixture.ledger.record_empty_poll(start);
        fixture.turn();
        fixture.ledger.record_arrival();
        fixture.ledger.record_take(ConsumerState::Overlap, start + 40 * MS);
    }
    let [_, scheduled, _, backlog, _] = fixture.times();
    assert!(scheduled >= 60 && backlog >= 30, "{scheduled}, {backlog}");
}

#[test]
fn a_wait_is_counted_before_it_ends() {
    let (ledger, now) = ledger();
    ledger.enter_consumer(ConsumerState::SourceWait, 0);
    now.store(3_600 * S, Ordering::Relaxed);
    assert_eq!(ledger.read().of(ConsumerState::SourceWait), 3_600 * S);
    assert_eq!(ledger.read().producer, [3_600 * S, 0]);
}

#[test]
fn the_states_of_each_half_add_up_to_its_lifetime() {
    let (ledger, now) = ledger();
    ledger.enter_consumer(ConsumerState::SourceWait, 10 * MS);
    ledger.enter_consumer(ConsumerState::Scheduled, 15 * MS);
    ledger.enter_consumer(ConsumerState::Backlog, 16 * MS);
    ledger.enter_producer(ProducerState::Room, 20 * MS);
    ledger.enter_consumer(ConsumerState::Paused, 40 * MS);
    now.store(50 * MS, Ordering::Relaxed);
    ledger.end_producer();
    now.store(70 * MS, Ordering::Relaxed);
    let times = ledger.read();
    assert_eq!(times.consumer, [5 * MS, MS, 10 * MS, 24 * MS, 30 * MS]);
    assert_eq!(times.producer, [20 * MS, 30 * MS]);
    assert_eq!(times.at, 70 * MS);
    ledger.end_consumer();
    now.store(90 * MS, Ordering::Relaxed);
    assert_eq!(ledger.read().at, 70 * MS, "the sums are constant after the end");
}

/// Reads a ledger until it has ended. Returns the longest lifetime that was read before.
fn longest_lifetime(ledger: &Ledger, reads: &AtomicU64) -> Nanos {
    let mut longest = 0;
    while !ledger.is_ended() {
        longest = ledger.read().at.max(longest);
        add(reads, 1);
    }
    longest
}

#[test]
fn no_reader_sees_a_lifetime_longer_than_the_final_one() {
    let clock = Clock::start();
    let watchdog = Arc::new(Watchdog::new(clock.clone(), false));
    for _ in 0..500 {
        let ledger = Ledger::new(clock.clone(), Arc::clone(&watchdog));
        let reads = AtomicU64::new(0);
        let longest = std::thread::scope(|scope| {
            let reader = scope.spawn(|| longest_lifetime(&ledger, &reads));
            while reads.load(Ordering::Relaxed) < 3 {
                std::thread::yield_now();
            }
            ledger.end_consumer();
            reader.join().unwrap_or(Nanos::MAX)
        });
        assert!(ledger.read().at >= longest, "{} after {longest}", ledger.read().at);
    }
}

#[test]
fn a_wait_with_a_late_turn_is_the_runtimes_from_2_ms_before_the_turn_was_due() {
    let fixture = Fixture::waiting();
    fixture.at(30 * MS);
    let before = fixture.times();
    assert_eq!(before, [8, 22, 0, 0, 0]);
    fixture.turn();
    fixture.ledger.record_arrival();
    assert_eq!(fixture.times(), before, "the arrival changes nothing");
}

#[test]
fn a_turn_that_runs_in_time_proves_that_the_runtime_is_not_late() {
    let fixture = Fixture::waiting();
    for ms in [11, 22, 33] {
        fixture.at(ms * MS);
        fixture.turn();
    }
    assert_eq!(fixture.times(), [33, 0, 0, 0, 0]);
}

#[test]
fn a_woken_consumer_that_lets_rows_wait_is_busy_unless_the_runtime_was_late() {
    let fixture = Fixture::waiting();
    fixture.at(MS);
    fixture.ledger.record_arrival();
    fixture.at(9 * MS);
    assert!(fixture.ledger.record_take(ConsumerState::Overlap, 9 * MS), "it let rows wait");
    assert_eq!(fixture.times(), [1, 0, 0, 8, 0]);

    fixture.ledger.record_empty_poll(9 * MS);
    fixture.turn();
    fixture.ledger.record_arrival();
    fixture.at(39 * MS);
    fixture.turn();
    fixture.ledger.record_take(ConsumerState::Overlap, 39 * MS);
    assert_eq!(fixture.times(), [1, 30, 0, 8, 0], "the turn did not run earlier");
}

#[test]
fn a_consumer_that_takes_rows_within_half_a_millisecond_takes_them_at_once() {
    let fixture = Fixture::new();
    fixture.ledger.record_empty_poll(0);
    fixture.ledger.record_arrival();
    fixture.at(AT_ONCE);
    assert!(!fixture.ledger.record_take(ConsumerState::Overlap, AT_ONCE));
    assert_eq!(fixture.times(), [1, 0, 0, 0, 0]);
}

#[test]
fn a_consumer_that_polls_while_a_turn_is_overdue_was_late_itself() {
    let fixture = Fixture::polled_while_a_turn_was_overdue();
    fixture.at(41 * MS);
    fixture.ledger.record_arrival();
    assert_eq!(fixture.times(), [9, 0, 0, 32, 0], "rows that arrive at once were ready before");
}

#[test]
fn rows_that_do_not_arrive_at_once_were_not_ready_before() {
    let fixture = Fixture::polled_while_a_turn_was_overdue();
    for ms in [42, 44, 46] {
        fixture.at(ms * MS);
        fixture.turn();
    }
    fixture.ledger.record_arrival();
    assert_eq!(fixture.times(), [14, 0, 32, 0, 0]);
}

#[test]
fn while_the_runtime_is_suspect_a_waiting_consumer_is_busy_until_it_yields_the_thread() {
    let fixture = Fixture::suspect();
    let before = fixture.times();
    // Its task runs for another 20 ms after the poll. Then the turn runs that it requested.
    fixture.ledger.record_empty_poll(100 * MS + 2);
    fixture.at(120 * MS);
    fixture.turn();
    fixture.ledger.record_arrival();
    assert_eq!(fixture.times_since(before), [0, 0, 0, 20, 0]);
    fixture.ledger.record_take(ConsumerState::Overlap, 120 * MS);

    // It yields at once, and then others block the thread.
    fixture.ledger.record_empty_poll(120 * MS);
    fixture.turn();
    fixture.at(140 * MS);
    fixture.ledger.record_arrival();
    fixture.ledger.record_take(ConsumerState::Overlap, 140 * MS);
    assert_eq!(fixture.times_since(before), [0, 20, 0, 20, 0]);
}

#[test]
fn while_the_runtime_is_suspect_a_turn_runs_just_before_a_consumer_that_rows_wake() {
    let fixture = Fixture::suspect();
    let before = fixture.times();
    fixture.ledger.record_empty_poll(100 * MS);
    fixture.turn();
    fixture.at(100 * MS + 2);
    fixture.ledger.record_arrival();
    fixture.at(105 * MS);
    fixture.turn();
    fixture.at(120 * MS);
    // The 5 ms until the turn are the runtime's, and the rest is the consumer's own.
    fixture.ledger.record_take(ConsumerState::Overlap, 120 * MS);
    assert_eq!(fixture.times_since(before), [0, 5, 0, 15, 0]);
}

#[test]
fn decoding_never_exceeds_the_time_in_which_the_consumer_was_busy() {
    let (ledger, now) = ledger();
    now.store(MS, Ordering::Relaxed);
    ledger.record_decode(5 * MS);
    assert_eq!(ledger.read().decode, MS);
}

#[test]
fn the_window_covers_only_the_last_ten_seconds() {
    let (ledger, now) = ledger();
    // A minute of waiting, then half a minute of backlog, in steps of a second.
    for second in 0..60 {
        ledger.enter_consumer(ConsumerState::SourceWait, second * S);
    }
    for second in 60..90 {
        ledger.enter_consumer(ConsumerState::Backlog, second * S);
    }
    now.store(90 * S, Ordering::Relaxed);
    let (times, start) = (ledger.read(), ledger.read_window_start());
    assert_eq!(times.of(ConsumerState::Backlog) - start[ConsumerState::Backlog as usize], 10 * S);
    assert_eq!(times.of(ConsumerState::SourceWait), start[ConsumerState::SourceWait as usize]);
}

#[test]
fn the_window_slides_even_if_no_state_changes() {
    let (ledger, now) = ledger();
    ledger.enter_consumer(ConsumerState::Backlog, 0);
    ledger.enter_consumer(ConsumerState::SourceWait, 5 * S);
    now.store(500 * S, Ordering::Relaxed);
    let (times, start) = (ledger.read(), ledger.read_window_start());
    assert_eq!(times.of(ConsumerState::SourceWait) - start[ConsumerState::SourceWait as usize], 10 * S);
    assert_eq!(times.of(ConsumerState::Backlog), start[ConsumerState::Backlog as usize]);
}
