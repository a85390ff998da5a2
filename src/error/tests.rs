use tokio::io::AsyncWriteExt as _;
use tokio_postgres::{Config, NoTls};

use super::*;

/// Returns the error that the client makes of an `ErrorResponse` with these fields.
async fn received(fields: &[(u8, &str)]) -> tokio_postgres::Error {
    let mut body: Vec<u8> =
        fields.iter().flat_map(|(kind, text)| [&[*kind], text.as_bytes(), &[0]].concat()).collect();
    body.push(0);
    let (ours, mut theirs) = tokio::io::duplex(1_024);
    theirs.write_u8(b'E').await.unwrap();
    theirs.write_u32(u32::try_from(body.len()).unwrap() + 4).await.unwrap();
    theirs.write_all(&body).await.unwrap();
    Config::new().user("u").connect_raw(ours, NoTls).await.err().expect("the server sent an error")
}

async fn kind_of(severity: &[(u8, &str)], code: &str) -> ErrorKind {
    let error = Error::query(received(&[severity, &[(b'C', code), (b'M', "why")]].concat()).await);
    assert_eq!(error.sqlstate().unwrap().code(), code);
    error.kind()
}

#[tokio::test]
async fn severity_and_not_sqlstate_decides_whether_the_connection_is_lost() {
    let kinds =
        [("ERROR", ErrorKind::Query), ("FATAL", ErrorKind::Disconnected), ("PANIC", ErrorKind::Disconnected)];
    let codes = ["25P03", "25P04", "40001", "57P01", "58P01", "XX000"];
    for ((severity, kind), code) in kinds.iter().flat_map(|kind| codes.map(|code| (kind, code))) {
        let translated = kind_of(&[(b'S', "in other words"), (b'V', severity)], code).await;
        let old = kind_of(&[(b'S', severity)], code).await;
        assert_eq!((translated, old), (*kind, *kind), "{severity} {code}");
    }
}

#[test]
fn error_is_one_line_and_nothing_is_escaped_twice() {
    let name = "a\n\r\t\u{1b}\u{7f}\u{85}\u{2028}\u{2029}\0é'\"\\";
    let escaped = r#"a\n\r\t\u{1b}\u{7f}\u{85}\u{2028}\u{2029}\0é'"\"#;
    let error = Error::config(format!("{name}, {}", "plain")).of_entity(&name.into());
    assert_eq!(error.to_string(), format!("{escaped}: {escaped}, plain"));
    assert_eq!(format!("{error:?}"), format!("Config: {error}"));
    let quoted = Error::config(format!("{:?}", "\n\u{1b}\u{2028}"));
    assert_eq!(quoted.to_string(), r#""\n\u{1b}\u{2028}""#);
}

#[tokio::test]
async fn recorded_text_has_neither_the_sqlstate_nor_a_message_that_may_quote_values() {
    let recorded = async |code| {
        let fields = [(b'S', "ERROR"), (b'C', code), (b'M', "the message"), (b'D', "the detail")];
        let error = Error::query(received(&fields).await).of_entity(&"orders".into());
        Recorded(&error).to_string()
    };
    assert_eq!(recorded("53200").await, "orders: the message; detail: the detail");
    for (code, what) in [("22P02", "data exception"), ("23505", "constraint violation")] {
        let hidden = format!("orders: {what} (its message may quote values, so it is not recorded)");
        assert_eq!(recorded(code).await, hidden);
    }
}
