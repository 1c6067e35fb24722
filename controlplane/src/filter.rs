//! Filters of lists, after AIP-160: `phase = PHASE_PROTECTED AND (rpo_target_us < 500000 OR NOT description:"test*")`.
//!
//! ```text
//! expression = sequence { AND sequence }      sequence = factor { factor }      factor = term { OR term }
//! term       = [ NOT | "-" ] simple           simple   = "(" expression ")" | restriction
//! restriction = member [ comparator value ]   member   = name { "." name }
//! ```
//! Names are checked against the message when the filter is read, so that one that is mistyped is refused and does not
//! merely find nothing. A member that passes through a list holds if it holds for any of its elements.

use prost::{Message, Name};
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, ReflectMessage, Value};

use crate::fields::dynamic;
use crate::problem::Problem;

/// Longest filter, bytes.
const MAX_FILTER: usize = 2048;
/// Deepest parentheses.
const MAX_DEPTH: usize = 32;

/// A filter.
#[derive(Clone, Debug)]
pub struct Filter(Option<Node>);

#[derive(Clone, Debug)]
enum Node {
    All(Vec<Node>),
    Any(Vec<Node>),
    Not(Box<Node>),
    Compare {
        path: Vec<FieldDescriptor>,
        how: How,
        value: String,
    },
    /// A word alone: in any text.
    Word(String),
}

#[derive(Copy, Clone, PartialEq, Eq, Debug)]
enum How {
    Equal,
    Unequal,
    Less,
    AtMost,
    More,
    AtLeast,
    Has,
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Token {
    /// Bare or quoted; the latter is never a keyword.
    Text {
        text: String,
        quoted: bool,
    },
    How(How),
    Open,
    Close,
    Dot,
    Minus,
}

fn bad(filter: &str, why: impl Into<String>) -> Problem {
    Problem::invalid("filter", filter, why)
}

impl Filter {
    /// Reads a filter for messages of this kind; an empty one lets everything through.
    ///
    /// # Errors
    /// It cannot be read, names a field that is not there, or compares one with what it cannot be.
    pub fn parse<M: Message + Name + Default>(filter: &str) -> Result<Self, Problem> {
        if filter.len() > MAX_FILTER {
            return Err(bad(filter, format!("up to {MAX_FILTER} bytes")));
        }
        let tokens = tokens(filter).map_err(|why| bad(filter, why))?;
        if tokens.is_empty() {
            return Ok(Self(None));
        }
        let message = dynamic(&M::default()).descriptor();
        let mut parser = Parser { tokens: &tokens, at: 0, message, depth: 0 };
        let node = parser.expression().map_err(|why| bad(filter, why))?;
        if parser.at < tokens.len() {
            return Err(bad(filter, "nothing after a closing parenthesis that none has opened"));
        }
        Ok(Self(Some(node)))
    }

    /// Whether a message passes.
    pub fn fits<M: Message + Name>(&self, message: &M) -> bool {
        self.0.as_ref().is_none_or(|node| fits(node, &dynamic(message)))
    }
}

fn tokens(filter: &str) -> Result<Vec<Token>, String> {
    let mut out = Vec::new();
    let mut rest = filter.chars().peekable();
    // A minus is "not" at the beginning of a term, and part of the text elsewhere.
    let mut begins = true;
    while let Some(c) = rest.next() {
        let token = match c {
            c if c.is_whitespace() => {
                begins = true;
                continue;
            }
            '(' => Token::Open,
            ')' => Token::Close,
            '.' => Token::Dot,
            ':' => Token::How(How::Has),
            '=' => Token::How(How::Equal),
            '!' if rest.next_if_eq(&'=').is_some() => Token::How(How::Unequal),
            '!' => return Err("\"!=\"; for not: NOT or \"-\"".to_owned()),
            '<' if rest.next_if_eq(&'=').is_some() => Token::How(How::AtMost),
            '<' => Token::How(How::Less),
            '>' if rest.next_if_eq(&'=').is_some() => Token::How(How::AtLeast),
            '>' => Token::How(How::More),
            '-' if begins && !matches!(out.last(), Some(Token::How(_))) => Token::Minus,
            quote @ ('"' | '\'') => {
                let mut text = String::new();
                loop {
                    match rest.next() {
                        None => return Err("a quote at the end of the text as well".to_owned()),
                        Some('\\') => text.extend(rest.next()),
                        Some(c) if c == quote => break,
                        Some(c) => text.push(c),
                    }
                }
                Token::Text { text, quoted: true }
            }
            c => {
                let mut text = String::from(c);
                // Of a value a dot is a part: 1.5, 10.0.0.1:7000 has to be quoted.
                let value = matches!(out.last(), Some(Token::How(_)));
                while let Some(c) =
                    rest.next_if(|c| !c.is_whitespace() && !"():=!<>\"'".contains(*c) && (value || *c != '.'))
                {
                    text.push(c);
                }
                Token::Text { text, quoted: false }
            }
        };
        begins = matches!(token, Token::Open | Token::Minus);
        out.push(token);
    }
    Ok(out)
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    message: MessageDescriptor,
    depth: usize,
}

impl Parser<'_> {
    fn keyword(&mut self, word: &str) -> bool {
        let found = matches!(self.tokens.get(self.at), Some(Token::Text { text, quoted: false }) if text == word);
        self.at += usize::from(found);
        found
    }

    fn is(&mut self, token: &Token) -> bool {
        let found = self.tokens.get(self.at) == Some(token);
        self.at += usize::from(found);
        found
    }

    fn expression(&mut self) -> Result<Node, String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(format!("parentheses up to {MAX_DEPTH} deep"));
        }
        let mut all = Vec::new();
        loop {
            all.push(self.factor()?);
            // One after the other is an AND, too.
            let more = self.keyword("AND");
            if !more && matches!(self.tokens.get(self.at), None | Some(Token::Close)) {
                break;
            }
        }
        self.depth -= 1;
        Ok(if all.len() == 1 { all.remove(0) } else { Node::All(all) })
    }

    fn factor(&mut self) -> Result<Node, String> {
        let mut any = vec![self.term()?];
        while self.keyword("OR") {
            any.push(self.term()?);
        }
        Ok(if any.len() == 1 { any.remove(0) } else { Node::Any(any) })
    }

    fn term(&mut self) -> Result<Node, String> {
        if self.keyword("NOT") || self.is(&Token::Minus) {
            return Ok(Node::Not(Box::new(self.simple()?)));
        }
        self.simple()
    }

    fn simple(&mut self) -> Result<Node, String> {
        if self.is(&Token::Open) {
            let inner = self.expression()?;
            if !self.is(&Token::Close) {
                return Err("a closing parenthesis for each that is opened".to_owned());
            }
            return Ok(inner);
        }
        let expected = "a field, such as name = \"x\"; a word; or parentheses".to_owned();
        let Some(Token::Text { text, quoted }) = self.tokens.get(self.at) else { return Err(expected) };
        if !quoted && ["AND", "OR", "NOT"].contains(&text.as_str()) {
            return Err(expected);
        }
        self.at += 1;
        let (mut names, quoted) = (vec![text.clone()], *quoted);
        while self.is(&Token::Dot) {
            let Some(Token::Text { text, .. }) = self.tokens.get(self.at) else { return Err(expected) };
            names.push(text.clone());
            self.at += 1;
        }
        let Some(Token::How(how)) = self.tokens.get(self.at) else {
            return Ok(Node::Word(names.join(".").to_lowercase()));
        };
        self.at += 1;
        if quoted {
            return Err("the name of a field before a comparison, without quotes".to_owned());
        }
        let negative = self.is(&Token::Minus);
        let Some(Token::Text { text, .. }) = self.tokens.get(self.at) else {
            return Err("a value after a comparison".to_owned());
        };
        self.at += 1;
        let value = if negative { format!("-{text}") } else { text.clone() };
        let path = self.path(&names)?;
        check(path.last().expect("a path has a name"), *how, &value)?;
        Ok(Node::Compare { path, how: *how, value })
    }

    fn path(&self, names: &[String]) -> Result<Vec<FieldDescriptor>, String> {
        let mut message = Some(self.message.clone());
        let mut path = Vec::new();
        for name in names {
            let of = message.ok_or_else(|| format!("nothing below {}", path_text(&path)))?;
            let field = of.get_field_by_name(name).ok_or_else(|| {
                let all: Vec<String> = of.fields().map(|f| f.name().to_owned()).collect();
                format!("of {}: {}", of.name(), all.join(", "))
            })?;
            message = field.kind().as_message().cloned();
            path.push(field);
        }
        Ok(path)
    }
}

fn path_text(path: &[FieldDescriptor]) -> String {
    path.iter().map(FieldDescriptor::name).collect::<Vec<_>>().join(".")
}

/// Refuses a comparison that can never hold.
fn check(field: &FieldDescriptor, how: How, value: &str) -> Result<(), String> {
    let name = field.name();
    let ordered = !matches!(how, How::Equal | How::Unequal | How::Has);
    match field.kind() {
        Kind::Message(_) if how == How::Has && value == "*" => Ok(()),
        Kind::Message(_) => Err(format!("{name}:* for whether it is set, or a field of it: {name}.…")),
        Kind::Bytes => Err(format!("no bytes: {name}")),
        Kind::String if ordered => Err(format!("= != or : with the text {name}")),
        Kind::String => Ok(()),
        _ if how == How::Has && value == "*" => Ok(()),
        Kind::Bool if !ordered && ["true", "false"].contains(&value) => Ok(()),
        Kind::Bool => Err(format!("true or false with {name}")),
        Kind::Enum(e) => {
            let words: Vec<String> = e.values().map(|v| v.name().to_owned()).collect();
            if !ordered && (words.iter().any(|w| w == value) || value.parse::<i32>().is_ok()) {
                return Ok(());
            }
            Err(format!("= != or : with one of {}", words.join(", ")))
        }
        _ if value.parse::<f64>().is_ok_and(f64::is_finite) => Ok(()),
        _ => Err(format!("a number with {name}")),
    }
}

fn fits(node: &Node, message: &DynamicMessage) -> bool {
    match node {
        Node::All(nodes) => nodes.iter().all(|n| fits(n, message)),
        Node::Any(nodes) => nodes.iter().any(|n| fits(n, message)),
        Node::Not(node) => !fits(node, message),
        Node::Word(word) => any_text(message, word),
        // Of a list, "is not" means that none is.
        Node::Compare { path, how: How::Unequal, value } => !holds(message, path, How::Equal, value),
        Node::Compare { path, how, value } => holds(message, path, *how, value),
    }
}

fn any_text(message: &DynamicMessage, word: &str) -> bool {
    fn has(value: &Value, word: &str) -> bool {
        match value {
            Value::String(text) => text.to_lowercase().contains(word),
            Value::List(values) => values.iter().any(|v| has(v, word)),
            Value::Message(message) => any_text(message, word),
            _ => false,
        }
    }
    message.fields().any(|(_, value)| has(value, word))
}

fn holds(message: &DynamicMessage, path: &[FieldDescriptor], how: How, value: &str) -> bool {
    let Some((field, rest)) = path.split_first() else { return false };
    // What is not set can be nothing in particular; a plain field that is not set is its default.
    let set = message.has_field(field);
    if field.supports_presence() && !set {
        return false;
    }
    let found = message.get_field(field);
    let each = |found: &Value| match (found, rest.is_empty()) {
        (Value::Message(inner), false) => holds(inner, rest, how, value),
        (found, _) => one(found, field, set, how, value),
    };
    match &*found {
        Value::List(values) if rest.is_empty() && value == "*" && how == How::Has => !values.is_empty(),
        Value::List(values) => values.iter().any(each),
        found => each(found),
    }
}

fn one(found: &Value, field: &FieldDescriptor, set: bool, how: How, value: &str) -> bool {
    if how == How::Has && value == "*" {
        return set;
    }
    match found {
        Value::String(text) if how == How::Has && !field.is_list() => matches(text, value) || contains(text, value),
        Value::String(text) => matches(text, value),
        Value::Bool(found) => found.to_string() == value,
        Value::EnumNumber(number) => {
            let Kind::Enum(e) = field.kind() else { return false };
            number.to_string() == value || e.get_value(*number).is_some_and(|v| v.name() == value)
        }
        Value::I32(n) => number(i128::from(*n), how, value),
        Value::I64(n) => number(i128::from(*n), how, value),
        Value::U32(n) => number(i128::from(*n), how, value),
        Value::U64(n) => number(i128::from(*n), how, value),
        Value::F32(n) => value.parse().is_ok_and(|v| ordered(f64::from(*n).partial_cmp(&v), how)),
        Value::F64(n) => value.parse().is_ok_and(|v| ordered(n.partial_cmp(&v), how)),
        _ => false,
    }
}

fn number(found: i128, how: How, value: &str) -> bool {
    // Whole numbers are compared as such: nanoseconds do not fit a double.
    match value.parse::<i128>() {
        Ok(value) => ordered(Some(found.cmp(&value)), how),
        Err(_) => value.parse().is_ok_and(|v: f64| ordered((found as f64).partial_cmp(&v), how)),
    }
}

fn ordered(found: Option<std::cmp::Ordering>, how: How) -> bool {
    found.is_some_and(|found| match how {
        How::Equal | How::Has => found.is_eq(),
        How::Unequal => found.is_ne(),
        How::Less => found.is_lt(),
        How::AtMost => found.is_le(),
        How::More => found.is_gt(),
        How::AtLeast => found.is_ge(),
    })
}

fn contains(text: &str, value: &str) -> bool {
    !value.contains('*') && text.to_lowercase().contains(&value.to_lowercase())
}

/// Equal, with `*` at either end of what is wanted for anything.
fn matches(text: &str, wanted: &str) -> bool {
    match (wanted.strip_prefix('*'), wanted.strip_suffix('*')) {
        (Some(""), _) => true,
        (Some(rest), Some(_)) => text.contains(&rest[..rest.len() - 1]),
        (Some(end), None) => text.ends_with(end),
        (None, Some(begin)) => text.starts_with(begin),
        (None, None) => text == wanted,
    }
}

#[cfg(test)]
mod tests {
    use afterimage_wire::v1::{Disk, Group, Phase, Policy};

    use super::*;

    fn group() -> Group {
        Group {
            name: "tenants/default/groups/shop".into(),
            description: "The web shop".into(),
            version: 7,
            create_time_ns: 1_700_000_000_000_000_001,
            phase: Phase::Protected.into(),
            disks: vec![
                Disk { path: "/dev/sda".into(), size_bytes: 10, ..Disk::default() },
                Disk { path: "/dev/sdb".into(), size_bytes: 20, ..Disk::default() },
            ],
            ..Group::default()
        }
    }

    #[test]
    fn fields_are_compared_as_what_they_are() {
        for (filter, wanted) in [
            ("", true),
            ("version = 7", true),
            ("version != 7", false),
            ("version >= 7 AND version < 8", true),
            ("version > -1", true),
            ("create_time_ns = 1700000000000000001", true),
            ("create_time_ns = 1700000000000000002", false),
            ("phase = PHASE_PROTECTED", true),
            ("phase != PHASE_PROTECTED", false),
            ("phase = PHASE_SYNCING OR phase = PHASE_PROTECTED", true),
            ("name = \"tenants/default/groups/shop\"", true),
            ("name = \"*shop\"", true),
            ("name = tenants/default/*", true),
            ("description:web", true),
            ("description = web", false),
            ("description = \"*web*\"", true),
            ("-version = 7", false),
            ("NOT version = 8", true),
            ("shop", true),
            ("nowhere", false),
            ("disks.path = \"/dev/sdb\"", true),
            ("disks.path != \"/dev/sdb\"", false),
            ("disks.path:\"/dev/*\"", true),
            ("disks.size_bytes > 15", true),
            ("disks.size_bytes > 25", false),
            ("disks:*", true),
            ("operation:*", false),
            ("version=7", true),
            ("(version = 8 OR version = 7) shop", true),
        ] {
            let parsed = Filter::parse::<Group>(filter).unwrap_or_else(|e| panic!("{filter}: {e}"));
            assert_eq!(parsed.fits(&group()), wanted, "{filter}");
        }
    }

    #[test]
    fn or_binds_closer_than_and() {
        // As (version = 7) AND (version = 8 OR version = 9).
        let filter = Filter::parse::<Group>("version = 7 AND version = 8 OR version = 9").unwrap();
        assert!(!filter.fits(&group()));
        assert!(!filter.fits(&Group { version: 9, ..group() }));
    }

    #[test]
    fn what_is_not_set_is_no_number() {
        let filter = Filter::parse::<Policy>("lease_ms < 5").unwrap();
        assert!(!filter.fits(&Policy::default()));
        assert!(filter.fits(&Policy { lease_ms: Some(0), ..Policy::default() }));
        let set = Filter::parse::<Policy>("lease_ms:*").unwrap();
        assert!(!set.fits(&Policy::default()) && set.fits(&Policy { lease_ms: Some(0), ..Policy::default() }));
    }

    #[test]
    fn nonsense_is_refused_by_the_field_filter() {
        for bad in [
            "nonsense = 1",
            "version = x",
            "version",
            "phase = PROTECTED",
            "phase > PHASE_PROTECTED",
            "(version = 1",
            "version = 1)",
            "version =",
            "= 1",
            "version = 1 AND",
            "OR version = 1",
            "name = \"x",
            "disks = 1",
            "version.x = 1",
            "name < a",
            "version ! 1",
            "\"version\" = 1",
            "NOT",
            &"(".repeat(100),
            &"a".repeat(3000),
        ] {
            match Filter::parse::<Group>(bad) {
                // A bare word is looked for everywhere.
                Ok(_) => assert_eq!(bad, "version"),
                Err(Problem::Invalid { field, .. }) => assert_eq!(field, "filter"),
                Err(other) => panic!("{bad}: {other}"),
            }
        }
    }
}
