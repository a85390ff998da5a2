//! Streams and the tokio runtime: nothing panics or hangs when the runtime shuts down, and a stream can be used
//! outside of it.

use std::sync::{Mutex, Once, PoisonError, mpsc};
use std::time::{Duration, Instant};

use fraiseql_stream::{Connection, ErrorKind, JsonStream};
use futures_util::StreamExt;
use serde_json::Value;
use tokio::runtime::{Builder, Runtime};

use crate::server::{
    Admin, Database, Doc, ENDLESS, SILENT, SOON, assert_consecutive, backend_pid, connect, read_all, trickle,
};

/// The thread name and the message of each panic.
static PANICS: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Records panics, because tokio swallows those of tasks.
fn record_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let thread = std::thread::current().name().unwrap_or_default().to_owned();
            PANICS.lock().unwrap_or_else(PoisonError::into_inner).push((thread, info.to_string()));
            before(info);
        }));
    });
}

/// Runs `work` on a thread named `name`. Fails if it hangs, or if a thread of that name panics; `work` uses the name
/// for the workers of its runtime, too.
fn assert_no_panic_or_hang(name: &'static str, work: impl FnOnce() + Send + 'static) {
    record_panics();
    let (done, ended) = mpsc::channel();
    let work = move || {
        work();
        let _ = done.send(());
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(work).unwrap();
    let outcome = ended.recv_timeout(SOON);
    // Cloned to release the lock: the hook takes it when an assertion fails.
    let mut ours = PANICS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    ours.retain(|(thread, _)| thread == name);
    assert!(ours.is_empty(), "{ours:?}");
    assert!(outcome.is_ok(), "still running after {SOON:?}");
}

fn multi_thread(name: &str) -> Runtime {
    Builder::new_multi_thread().worker_threads(2).thread_name(name).enable_all().build().unwrap()
}

fn current_thread(_: &str) -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

type Make = fn(&str) -> Runtime;

const RUNTIMES: [Make; 2] = [multi_thread, current_thread];

fn database() -> Database {
    Database::with(&format!("{ENDLESS} {SILENT} {}", trickle("slow", 50, 0.003)))
}

/// Starts a stream and reads its first rows.
async fn streaming(url: &str) -> JsonStream<Doc> {
    let mut stream = connect(url).await.into_query::<Doc>("endless").stream().await.unwrap();
    for id in 0..10 {
        assert_eq!(stream.next().await.unwrap().unwrap().id, id);
    }
    stream
}

/// Starts a stream and waits until its query, which sends no row, is running.
async fn silent(url: &str) -> JsonStream<Value> {
    let admin = Admin::connect(url).await;
    let mut db = connect(url).await;
    let pid = backend_pid(&mut db).await;
    let stream = db.into_query::<Value>("silent").stream().await.unwrap();
    admin.until_waits_for(pid, "Timeout").await;
    stream
}

#[test]
fn runtime_can_shut_down_before_its_streams_are_dropped() {
    let url = database().url;
    for make in RUNTIMES {
        let url = url.clone();
        assert_no_panic_or_hang("runtime-first", move || {
            let runtime = make("runtime-first");
            let one = runtime.block_on(streaming(&url));
            let two = runtime.block_on(silent(&url));
            drop(runtime);
            assert!(one.stats().rows == 10 && two.stats().rows == 0);
            drop((one, two));
        });
    }
}

#[test]
fn runtime_can_shut_down_with_tasks_that_hold_streams() {
    let url = database().url;
    for make in RUNTIMES {
        let url = url.clone();
        assert_no_panic_or_hang("runtime-with-tasks", move || {
            let runtime = make("runtime-with-tasks");
            let mut one = runtime.block_on(streaming(&url));
            let mut two = runtime.block_on(silent(&url));
            runtime.spawn(async move { read_all(&mut one).await });
            runtime.spawn(async move { read_all(&mut two).await });
            // Lets both tasks read for a while.
            runtime.block_on(async { tokio::time::sleep(Duration::from_millis(20)).await });
            drop(runtime);
        });
    }
}

#[test]
fn runtime_can_shut_down_during_a_cancel() {
    let url = database().url;
    for make in RUNTIMES {
        for _ in 0..5 {
            let url = url.clone();
            assert_no_panic_or_hang("runtime-in-cancel", move || {
                let runtime = make("runtime-in-cancel");
                let (one, two) = (runtime.block_on(streaming(&url)), runtime.block_on(silent(&url)));
                drop((one, two));
                drop(runtime);
            });
        }
    }
}

#[test]
fn runtime_can_shut_down_in_the_background() {
    let url = database().url;
    for make in RUNTIMES {
        let url = url.clone();
        assert_no_panic_or_hang("runtime-background", move || {
            let runtime = make("runtime-background");
            let (one, two) = (runtime.block_on(streaming(&url)), runtime.block_on(silent(&url)));
            runtime.shutdown_background();
            drop((one, two));
        });
    }
}

/// Reads on without a runtime: first the rows in the channel, then an error instead of a normal end.
fn assert_lost(mut stream: JsonStream<Doc>) {
    let mut rows: Vec<Doc> = (0..10).map(|id| Doc { id }).collect();
    let error = loop {
        match futures::executor::block_on(stream.next()).expect("the stream must fail") {
            Ok(row) => rows.push(row),
            Err(error) => break error,
        }
    };
    assert_consecutive(&rows);
    assert!(rows.len() < 1_000_000);
    assert!(matches!(error.kind(), ErrorKind::Lost | ErrorKind::Disconnected), "{error:?}");
    assert!(error.to_string().starts_with("endless: "), "{error}");
    assert!(error.stats().is_some());
    assert!(futures::executor::block_on(stream.next()).is_none());
    let error = futures::executor::block_on(stream.close()).unwrap_err();
    assert_eq!(error.error().kind(), ErrorKind::Disconnected);
}

#[test]
fn stream_fails_after_its_runtime_has_shut_down() {
    let url = database().url;
    for make in RUNTIMES {
        let url = url.clone();
        assert_no_panic_or_hang("runtime-lost", move || {
            let runtime = make("runtime-lost");
            let stream = runtime.block_on(streaming(&url));
            drop(runtime);
            assert_lost(stream);
        });
    }
}

#[test]
fn stream_polled_elsewhere_fails_when_its_runtime_shuts_down() {
    let url = database().url;
    assert_no_panic_or_hang("runtime-lost-in-wait", move || {
        let (home, elsewhere) = (multi_thread("runtime-lost-in-wait"), current_thread(""));
        let mut stream = home.block_on(silent(&url));
        let observer = stream.observer();
        let reader = std::thread::Builder::new().name("runtime-lost-in-wait".to_owned());
        let reader = reader.spawn(move || elsewhere.block_on(stream.next())).unwrap();
        let start = Instant::now();
        while observer.stats().time.source_wait.is_zero() {
            assert!(start.elapsed() < SOON);
        }
        drop(home);
        let error = reader.join().unwrap().expect("the stream must fail").unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Lost | ErrorKind::Disconnected), "{error:?}");
    });
}

#[test]
fn stream_can_be_polled_without_a_runtime() {
    let database = database();
    let home = multi_thread("home");
    for entity in ["slow", "endless"] {
        let db = home.block_on(database.connect());
        let query = db.into_query::<Doc>(entity).limit(20_000);
        let mut stream = home.block_on(query.stream()).unwrap();
        let mut rows = Vec::new();
        while let Some(row) = futures::executor::block_on(stream.next()) {
            rows.push(row.unwrap());
        }
        assert_eq!(rows.len(), if entity == "slow" { 50 } else { 20_000 });
        assert_consecutive(&rows);
    }
}

#[test]
fn stream_dropped_without_a_runtime_is_cancelled() {
    let database = database();
    let home = multi_thread("home");
    let (admin, mut db) = home.block_on(async { (database.admin().await, database.connect().await) });
    let pid = home.block_on(backend_pid(&mut db));
    let stream = home.block_on(db.query::<Value>("silent").stream()).unwrap();
    home.block_on(admin.until_waits_for(pid, "Timeout"));
    let dropped = Instant::now();
    drop(stream);
    home.block_on(admin.until(pid, |now| now.is_some_and(|now| !now.is_active())));
    assert!(dropped.elapsed() < Duration::from_secs(1), "{:?}", dropped.elapsed());
}

#[test]
fn connection_is_closed_after_its_runtime_has_shut_down() {
    let database = database();
    let home = multi_thread("home");
    let mut db = home.block_on(database.connect());
    drop(home);
    assert!(db.is_closed());
    let elsewhere = current_thread("");
    let error = elsewhere.block_on(db.query::<Doc>("endless").stream()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disconnected);
    let mut again: Connection = elsewhere.block_on(database.connect());
    assert!(elsewhere.block_on(backend_pid(&mut again)) > 0);
}

#[test]
fn connection_whose_query_was_lost_with_a_runtime_is_closed_and_does_not_hang() {
    let database = database();
    assert_no_panic_or_hang("query-lost", move || {
        let (home, brief) = (multi_thread("query-lost"), current_thread(""));
        let (admin, mut db) = home.block_on(async { (database.admin().await, database.connect().await) });
        let pid = home.block_on(backend_pid(&mut db));
        let stream = brief.block_on(async {
            let stream = db.query::<Value>("silent").stream().await.unwrap();
            admin.until_waits_for(pid, "Timeout").await;
            stream
        });
        // This also ends the task that reads the rows, before the query has ended.
        drop(brief);
        drop(stream);
        assert!(db.is_closed());
        let error = home.block_on(db.query::<Doc>("slow").stream()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Disconnected);
    });
}
