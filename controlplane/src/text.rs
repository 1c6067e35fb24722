//! Texts from outside, which are not to be echoed at any length.

/// As much of the text as `most` bytes hold, in whole characters.
pub(crate) fn head(text: &str, most: usize) -> &str {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// The text, or as much of it as fits `most` bytes, with an ellipsis in the place of the rest.
pub(crate) fn shortened(text: &str, most: usize) -> String {
    const MORE: char = '…';
    if text.len() <= most {
        return text.to_owned();
    }
    let mut short = head(text, most - MORE.len_utf8()).to_owned();
    short.push(MORE);
    short
}

/// A moment as people write it, to the second: "2026-11-27T12:00:00Z".
pub(crate) fn time(at_ns: u64) -> String {
    let at = jiff::Timestamp::from_second((at_ns / 1_000_000_000).cast_signed());
    at.map_or_else(|_| "an unknown time".to_owned(), |at| at.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!((head("aé", 3), head("aé", 2), head("é", 0)), ("aé", "a", ""));
        assert_eq!(shortened("aé", 3), "aé");
        assert_eq!(shortened("aéaé", 5), "a…");
    }

    #[test]
    fn a_moment_is_to_the_second() {
        assert_eq!(time(1_700_000_000_999_999_999), "2023-11-14T22:13:20Z");
    }
}
