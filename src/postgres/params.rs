//! `Value`: an encoded parameter of a query.

use std::error::Error as StdError;
use std::fmt;

use bytes::{Bytes, BytesMut};
use tokio_postgres::types::{Format, IsNull, ToSql, Type, to_sql_checked};

use crate::error::Error;

/// The value of a parameter, encoded in the format that Postgres expects.
pub(crate) struct Value {
    bytes: Option<Bytes>,
    format: Format,
}

impl fmt::Debug for Value {
    // tokio-postgres logs parameters in this form, which must not show the data of the service.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.bytes {
            Some(bytes) => write!(f, "<{} bytes>", bytes.len()),
            None => f.write_str("NULL"),
        }
    }
}

/// Encodes values for the parameter types of a prepared statement.
///
/// # Errors
///
/// `Statement` if there are more or fewer values than parameters, or if a value does not match its type.
pub(crate) fn encode(values: &[&(dyn ToSql + Sync)], types: &[Type]) -> Result<Vec<Value>, Error> {
    if values.len() != types.len() {
        let (expected, received) = (counted(types.len(), "parameter"), counted(values.len(), "value"));
        return Err(Error::statement(
            format!("the query has {expected}, but where_sql received {received}"),
            "pass one value for each of $1, $2, ..., which are numbered across all calls of where_sql",
        ));
    }
    let encode = |(index, (value, ty)): (usize, (&&(dyn ToSql + Sync), &Type))| {
        let mut bytes = BytesMut::new();
        let is_null = value.to_sql_checked(ty, &mut bytes).map_err(|why| {
            let number = index + 1;
            Error::statement(
                format!("parameter ${number} does not accept the value: {why}"),
                &advice(number, ty),
            )
        })?;
        let bytes = matches!(is_null, IsNull::No).then(|| bytes.freeze());
        Ok(Value { bytes, format: value.encode_format(ty) })
    };
    values.iter().zip(types).enumerate().map(encode).collect()
}

fn advice(number: usize, ty: &Type) -> String {
    let rust = match *ty {
        Type::TEXT => {
            // As in data->>'key' = $1 with a number.
            return format!(
                "pass a string, or cast the other side to the type of the value: (data->>'key')::int4 = ${number} for an i32, ::int8 for an i64, ::float8 for an f64; for a list, write = ANY(${number})"
            );
        }
        Type::NUMERIC => {
            return format!(
                "cast the other side to float8 and pass an f64, or pass a string and write ${number}::text::numeric"
            );
        }
        Type::BOOL => " (a bool)",
        Type::INT2 => " (an i16)",
        Type::INT4 => " (an i32)",
        Type::INT8 => " (an i64)",
        Type::FLOAT4 => " (an f32)",
        Type::FLOAT8 => " (an f64)",
        Type::JSON | Type::JSONB => " (a serde_json::Value)",
        _ => "",
    };
    format!("pass a value of type {ty}{rust}, or pass a string and write ${number}::text::{ty} in where_sql")
}

/// Writes a count with its noun: `1 value`, `2 values`.
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

impl ToSql for Value {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn StdError + Sync + Send>> {
        Ok(match &self.bytes {
            Some(bytes) => {
                out.extend_from_slice(bytes);
                IsNull::No
            }
            None => IsNull::Yes,
        })
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn encode_format(&self, _: &Type) -> Format {
        self.format
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_of_a_parameter_hides_its_value() {
        let values = encode(&[&"s3cr3t", &None::<&str>], &[Type::TEXT, Type::TEXT]).unwrap();
        assert_eq!(format!("{values:?}"), "[<6 bytes>, NULL]");
    }
}
