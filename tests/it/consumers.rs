//! The verdict does not depend on how a stream is consumed: a table of ways, settings and runtimes. In each case one
//! side is slow by a wide margin.

mod case;
mod load;
mod occupancy;
mod sources;
mod table;
mod ways;

use std::time::Duration;

use fraiseql_stream::Verdict::{ConsumerBound, RuntimeBound, SourceBound};

use case::Case;
use table::Expected::{Busy, Is, NotTheSource};
use table::Flavor::{CurrentThread, MultiThread};
use table::{BLOCKING, BOTH, EVERY_10_MS, SLEEPING, SLOW_SOURCES, Setting, cases, check};
use ways::{
    BLOCK_IN_PLACE, BUFFER_UNORDERED, CHUNKS, CHUNKS_TIMEOUT, FOR_EACH_CONCURRENT, JOINED,
    JOINED_READY_CHUNKS, JOINED_WITH_CPU_WORK, MERGED, MPSC, NEXT, NEXT_CHUNK, NEXT_READY, NEXT_THEN_READY,
    NOW_OR_NEVER, POLL_IMMEDIATE, READY_CHUNKS_1000, READY_CHUNKS_5000, SELECT_FLUSH, SPAWN_BLOCKING,
    TIMEOUT_AT, Way,
};

/// Ways that take one row at a time.
const ROW_BY_ROW: [Way; 4] = [NEXT, TIMEOUT_AT, MERGED, JOINED];

/// Ways that take many rows and then work on them.
const BATCHES: [Way; 8] = [
    NEXT_CHUNK,
    READY_CHUNKS_1000,
    READY_CHUNKS_5000,
    CHUNKS,
    CHUNKS_TIMEOUT,
    NEXT_THEN_READY,
    SELECT_FLUSH,
    JOINED_READY_CHUNKS,
];

/// The ways of `BATCHES` in which nothing but rows wakes the task.
const BATCHES_OF_ONE_STREAM: &[Way] =
    &[NEXT_CHUNK, READY_CHUNKS_1000, READY_CHUNKS_5000, CHUNKS, CHUNKS_TIMEOUT, NEXT_THEN_READY];

/// Ways that work on several rows concurrently.
const CONCURRENT: [Way; 2] = [BUFFER_UNORDERED, FOR_EACH_CONCURRENT];

/// Ways that hand the work to another task or thread and wait for it.
const HANDED_OVER: [Way; 2] = [MPSC, SPAWN_BLOCKING];

/// Ways that check for a row and do something else if there is none.
const POLLS: [Way; 3] = [NEXT_READY, POLL_IMMEDIATE, NOW_OR_NEVER];

#[test]
fn slow_consumer_of_single_rows_is_consumer_bound() {
    let ways = [&ROW_BY_ROW[..], &POLLS].concat();
    check(&cases(&BOTH, &ways, &SLEEPING, Is(ConsumerBound)));
}

#[test]
fn slow_consumer_of_batches_is_consumer_bound() {
    check(&cases(&BOTH, &BATCHES, &SLEEPING, Is(ConsumerBound)));
}

#[test]
fn slow_consumer_that_works_alongside_the_stream_is_consumer_bound() {
    let work_elsewhere = [
        cases(&BOTH, &CONCURRENT, &SLEEPING, Is(ConsumerBound)),
        cases(&BOTH, &[MPSC], &SLEEPING, Is(ConsumerBound)),
        cases(&BOTH, &[SPAWN_BLOCKING], &BLOCKING, Is(ConsumerBound)),
        cases(&[MultiThread], &[BLOCK_IN_PLACE], &BLOCKING, Is(ConsumerBound)),
    ];
    check(&work_elsewhere.concat());
}

#[test]
fn consumer_that_blocks_its_thread_between_polls_is_consumer_bound() {
    let ways = [NEXT, NEXT_CHUNK, NEXT_THEN_READY];
    let all = [
        cases(&BOTH, &ways, &BLOCKING, Is(ConsumerBound)),
        cases(&[MultiThread], &[CHUNKS], &BLOCKING, Is(ConsumerBound)),
        cases(&[CurrentThread], &[CHUNKS], &BLOCKING[..2], Is(ConsumerBound)),
        // With 100 rows of 4 ms each, the second batch has only just begun when the case ends.
        cases(&[CurrentThread], &[CHUNKS], &BLOCKING[2..], Busy),
    ];
    check(&all.concat());
}

#[test]
fn consumer_that_blocks_its_thread_while_it_waits_for_rows_is_consumer_bound() {
    let ways = [READY_CHUNKS_1000, JOINED_READY_CHUNKS, JOINED_WITH_CPU_WORK];
    let on_two_threads = [
        cases(&[MultiThread], &ways, &BLOCKING, Is(ConsumerBound)),
        cases(&[MultiThread], &[SELECT_FLUSH], &BLOCKING[..1], Is(ConsumerBound)),
    ];
    let on_one_thread = cases(&[CurrentThread], &ways, &BLOCKING[..2], Is(ConsumerBound));
    // Two or three bursts of 200 ms cannot be attributed to a side. Nor can a burst of a task that is woken by its
    // own timer and does not poll the stream first.
    let ambiguous = [
        cases(&[CurrentThread], &[READY_CHUNKS_1000, JOINED_WITH_CPU_WORK], &BLOCKING[2..], NotTheSource),
        cases(&[CurrentThread], &[SELECT_FLUSH], &BLOCKING, NotTheSource),
        // One or two bursts take all of the time, and may block the thread on which the watchdog is about to run.
        cases(&[MultiThread], &[SELECT_FLUSH], &BLOCKING[1..], NotTheSource),
    ];
    check(&[on_two_threads.concat(), on_one_thread, ambiguous.concat()].concat());
}

#[test]
fn fast_consumer_of_single_rows_from_a_slow_source_is_source_bound() {
    let ways = [&ROW_BY_ROW[..], &CONCURRENT, &HANDED_OVER].concat();
    let rows = cases(&BOTH, &ways, &SLOW_SOURCES, Is(SourceBound));
    // With a poll every 1 to 3 ms, a row waits for 1 to 2 ms on average, which is much if rows come as often.
    let polls = cases(&BOTH, &[POLL_IMMEDIATE, NOW_OR_NEVER], &[EVERY_10_MS], Is(SourceBound));
    check(&[rows, polls].concat());
}

#[test]
fn fast_consumer_of_batches_from_a_slow_source_is_source_bound() {
    let batches = cases(&BOTH, &BATCHES, &SLOW_SOURCES, Is(SourceBound));
    let in_place = cases(&[MultiThread], &[BLOCK_IN_PLACE], &SLOW_SOURCES, Is(SourceBound));
    check(&[batches, in_place].concat());
}

/// Fast consumers on a runtime that other tasks block for `burst` milliseconds at a time.
fn starved(burst: u64) -> Vec<Case> {
    let setting = [Setting::Starved(Duration::from_millis(burst))];
    let alone = [&[NEXT, TIMEOUT_AT][..], &CONCURRENT, BATCHES_OF_ONE_STREAM].concat();
    // In these ways, a timer or another stream also wakes the task while others are about to block the thread.
    let woken_otherwise = [SELECT_FLUSH, MERGED, JOINED, JOINED_READY_CHUNKS];
    // Between polls, these ways wait for a task or a timer of the starved runtime.
    let delayed = [&HANDED_OVER[..], &[POLL_IMMEDIATE, NOW_OR_NEVER]].concat();
    let all = [
        cases(&BOTH, &alone, &setting, Is(RuntimeBound)),
        cases(&[MultiThread], &woken_otherwise, &setting, Is(RuntimeBound)),
        cases(&[CurrentThread], &woken_otherwise, &setting, NotTheSource),
        cases(&[MultiThread], &[BLOCK_IN_PLACE], &setting, Is(RuntimeBound)),
        cases(&BOTH, &delayed, &setting, NotTheSource),
    ];
    all.concat()
}

#[test]
fn runtime_starved_in_bursts_of_5_ms_is_runtime_bound() {
    check(&starved(5));
}

#[test]
fn runtime_starved_in_bursts_of_20_ms_is_runtime_bound() {
    check(&starved(20));
}

#[test]
fn runtime_starved_in_bursts_of_50_ms_is_runtime_bound() {
    check(&starved(50));
}
