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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!((head("aé", 3), head("aé", 2), head("é", 0)), ("aé", "a", ""));
        assert_eq!(shortened("aé", 3), "aé");
        assert_eq!(shortened("aéaé", 5), "a…");
    }
}
