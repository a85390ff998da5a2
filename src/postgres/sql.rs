//! `Sql`: the text of a query.

use crate::error::Error;

/// A query before it is prepared.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sql {
    pub(crate) entity: String,
    pub(crate) conditions: Vec<String>,
    pub(crate) order_by: Vec<String>,
    pub(crate) limit: Option<u64>,
    pub(crate) offset: Option<u64>,
}

impl Sql {
    /// Returns the text of the statement.
    ///
    /// # Errors
    ///
    /// `Config` if the entity is not a valid name, or if a clause contains a NUL byte.
    pub(crate) fn text(&self) -> Result<String, Error> {
        let from = format!("SELECT data FROM {}", quote(&self.entity)?);
        if self.conditions.iter().chain(&self.order_by).any(|text| text.contains('\0')) {
            return Err(Error::config(
                "invalid where_sql or order_by: it contains a NUL byte, which Postgres does not accept; remove it",
            ));
        }
        // Each on lines of its own, so that a comment at the end of a condition does not extend to what follows.
        let clauses = [
            clause("WHERE (", &self.conditions.join("\n) AND ("), "\n)"),
            clause("ORDER BY ", &self.order_by.join("\n, "), "\n"),
            self.limit.map_or_else(String::new, |limit| format!("\nLIMIT {limit}")),
            self.offset.map_or_else(String::new, |offset| format!("\nOFFSET {offset}")),
        ];
        Ok(from + &clauses.concat())
    }

    /// Returns the schema, if the name of the entity has one.
    pub(crate) fn schema(&self) -> Option<String> {
        let parts = split(&self.entity).ok()?;
        parts.len().checked_sub(2).map(|i| parts[i].clone())
    }
}

/// Puts a text between its keyword and `after`; an empty text makes no clause.
fn clause(before: &str, text: &str, after: &str) -> String {
    if text.is_empty() { String::new() } else { format!("\n{before}{text}{after}") }
}

/// Quotes each part of a relation's name. A quoted name is case-sensitive.
fn quote(entity: &str) -> Result<String, Error> {
    let parts = split(entity).map_err(|why| {
        Error::config(format!(
            "invalid entity {entity:?}: {why}; write name or schema.name, with double quotes around a part that contains a dot"
        ))
    })?;
    let quoted: Vec<_> = parts.iter().map(|part| format!("\"{}\"", part.replace('"', "\"\""))).collect();
    Ok(quoted.join("."))
}

/// Splits a name at the dots outside of double quotes, and removes the quotes. Returns why it is invalid otherwise.
fn split(entity: &str) -> Result<Vec<String>, &'static str> {
    if entity.contains('\0') {
        return Err("it contains a NUL byte");
    }
    let mut parts = Vec::new();
    let mut rest = entity;
    loop {
        let (part, after) = if let Some(quoted) = rest.strip_prefix('"') {
            unquote(quoted)?
        } else {
            let end = rest.find('.').unwrap_or(rest.len());
            (rest[..end].to_owned(), &rest[end..])
        };
        if part.is_empty() {
            return Err("it has an empty part");
        }
        parts.push(part);
        match after.strip_prefix('.') {
            Some(next) => rest = next,
            None if after.is_empty() => return Ok(parts),
            None => return Err("a closing quote is not followed by a dot"),
        }
    }
}

/// Splits a text after the closing quote, and returns the name before it. A doubled quote stands for one quote.
fn unquote(text: &str) -> Result<(String, &str), &'static str> {
    let mut name = String::new();
    let mut rest = text;
    while let Some(end) = rest.find('"') {
        name.push_str(&rest[..end]);
        rest = &rest[end + 1..];
        match rest.strip_prefix('"') {
            Some(more) => {
                name.push('"');
                rest = more;
            }
            None => return Ok((name, rest)),
        }
    }
    Err("a double quote is not closed")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(entity: &str) -> String {
        let sql = Sql { entity: entity.to_owned(), ..Sql::default() };
        sql.text().unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn entity_is_a_name_and_never_sql() {
        assert_eq!(text("orders"), r#"SELECT data FROM "orders""#);
        assert_eq!(text("sales.Orders"), r#"SELECT data FROM "sales"."Orders""#);
        assert_eq!(text("users; drop table x"), r#"SELECT data FROM "users; drop table x""#);
        assert_eq!(text(r#"a"b"#), r#"SELECT data FROM "a""b""#);
        assert_eq!(text(r#""a.b"."c""d""#), r#"SELECT data FROM "a.b"."c""d""#);
    }

    #[test]
    fn invalid_name_is_refused() {
        for entity in ["", ".", "a.", ".a", "a\0b", "\"a", "\"a\"b", "\"\""] {
            assert!(text(entity).starts_with("invalid entity "), "{entity:?}");
        }
    }

    #[test]
    fn each_clause_is_on_lines_of_its_own() {
        let sql = Sql {
            entity: "t".to_owned(),
            conditions: vec!["a = $1 -- why".to_owned(), "b OR c".to_owned()],
            order_by: vec!["a".to_owned(), "b DESC".to_owned()],
            limit: Some(3),
            offset: Some(1),
        };
        assert_eq!(
            sql.text().unwrap(),
            "SELECT data FROM \"t\"\nWHERE (a = $1 -- why\n) AND (b OR c\n)\nORDER BY a\n, b DESC\n\nLIMIT 3\nOFFSET 1"
        );
    }
}
