//! Lists in pages. A token is a place in the order of the list, not a count: what is created or deleted between two pages
//! shifts nothing.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use prost::{Message, Name};

use crate::ca::sha256;
use crate::filter::Filter;
use crate::problem::Problem;

/// Most objects on a page.
pub const MAX_PAGE: usize = 1000;
/// Longest page token, characters.
const MAX_TOKEN: usize = 1024;
/// First byte of a token.
const VERSION: u8 = 1;
/// Bytes of the hash of what a token goes with.
const BOUND: usize = 8;

/// What of a list is wanted.
pub struct Page {
    size: usize,
    after: Option<String>,
    bound: [u8; BOUND],
    filter: Filter,
}

impl Page {
    /// Reads what was asked for. `list` and `parent` are what the token goes with, besides the filter.
    ///
    /// # Errors
    /// A negative size, a token that is none or goes with another list, a filter that makes no sense.
    pub fn of<M: Message + Name + Default>(
        list: &str,
        parent: &str,
        size: i32,
        token: &str,
        filter: &str,
    ) -> Result<Self, Problem> {
        let size = match usize::try_from(size) {
            Err(_) => return Err(Problem::invalid("page_size", size, format!("0 to {MAX_PAGE}"))),
            Ok(0) => MAX_PAGE,
            Ok(size) => size.min(MAX_PAGE),
        };
        let bound = sha256(format!("{list}\0{parent}\0{filter}").as_bytes());
        let bound: [u8; BOUND] = bound[..BOUND].try_into().expect("shorter than a hash");
        Ok(Self { size, after: read(token, &bound)?, bound, filter: Filter::parse::<M>(filter)? })
    }

    /// The page: of items with the keys that they are ordered by, rising; and the token of the next, or nothing.
    pub fn take<M: Message + Name>(&self, items: impl IntoIterator<Item = (String, M)>) -> (Vec<M>, String) {
        let mut page = Vec::new();
        let mut last = String::new();
        for (key, item) in items {
            if self.after.as_ref().is_some_and(|after| key <= *after) || !self.filter.fits(&item) {
                continue;
            }
            if page.len() == self.size {
                return (page, self.token(&last));
            }
            page.push(item);
            last = key;
        }
        (page, String::new())
    }

    fn token(&self, last: &str) -> String {
        write(last, &self.bound)
    }

    /// The number after which the page begins, for lists that are ordered by a number; 0 for the first.
    ///
    /// # Errors
    /// The token holds none.
    pub fn after_number(&self) -> Result<u64, Problem> {
        self.after.as_deref().map_or(Ok(0), |after| after.parse().map_err(|_| bad(after)))
    }

    /// The token for what comes after this number.
    pub fn token_after(&self, number: u64) -> String {
        self.token(&number.to_string())
    }

    /// Whether an item passes the filter.
    pub fn fits<M: Message + Name>(&self, item: &M) -> bool {
        self.filter.fits(item)
    }
}

/// A token to resume the watch of `parent` with, after event `number` of `term`.
pub fn resume_token(parent: &str, term: u64, number: u64) -> String {
    write(&format!("{term} {number}"), &watch_bound(parent))
}

/// Term and event number of a token; none if there is no token.
///
/// # Errors
/// It is none, or of another parent's watch.
pub fn read_resume_token(parent: &str, token: &str) -> Result<Option<(u64, u64)>, Problem> {
    let refused = || Problem::invalid("resume_token", token, "a `resume_token` of a watch with the same parent");
    let Some(text) = read(token, &watch_bound(parent)).map_err(|_| refused())? else { return Ok(None) };
    let (term, number) = text.split_once(' ').ok_or_else(refused)?;
    Ok(Some((term.parse().map_err(|_| refused())?, number.parse().map_err(|_| refused())?)))
}

fn watch_bound(parent: &str) -> [u8; BOUND] {
    let hash = sha256(format!("watch\0{parent}").as_bytes());
    hash[..BOUND].try_into().expect("shorter than a hash")
}

fn bad(token: &str) -> Problem {
    Problem::invalid("page_token", token, "a `next_page_token` of the same list, with the same parent and filter")
}

fn write(last: &str, bound: &[u8; BOUND]) -> String {
    let mut bytes = vec![VERSION];
    bytes.extend(bound);
    bytes.extend(last.as_bytes());
    URL_SAFE_NO_PAD.encode(bytes)
}

fn read(token: &str, bound: &[u8; BOUND]) -> Result<Option<String>, Problem> {
    if token.is_empty() {
        return Ok(None);
    }
    let refused = || bad(token);
    let bytes = Some(token).filter(|t| t.len() <= MAX_TOKEN).and_then(|t| URL_SAFE_NO_PAD.decode(t).ok());
    let bytes = bytes.filter(|b| b.len() > 1 + BOUND).ok_or_else(refused)?;
    if bytes[0] != VERSION || bytes[1..=BOUND] != bound[..] {
        return Err(refused());
    }
    String::from_utf8(bytes[1 + BOUND..].to_vec()).map(Some).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use afterimage_wire::v1::Policy;

    use super::*;

    fn items(ids: &[&str]) -> Vec<(String, Policy)> {
        ids.iter().map(|id| ((*id).to_owned(), Policy { name: (*id).to_owned(), ..Policy::default() })).collect()
    }

    fn page(size: i32, token: &str, filter: &str) -> Page {
        Page::of::<Policy>("policies", "tenants/default", size, token, filter).unwrap()
    }

    fn names(page: &[Policy]) -> Vec<&str> {
        page.iter().map(|p| p.name.as_str()).collect()
    }

    #[test]
    fn what_is_there_all_the_time_is_listed_once_whatever_comes_and_goes() {
        let (first, token) = page(2, "", "").take(items(&["b", "d", "f", "h"]));
        assert_eq!(names(&first), ["b", "d"]);
        // "a" has come, "d" has gone, "e" has come.
        let (second, token) = page(2, &token, "").take(items(&["a", "b", "e", "f", "h"]));
        assert_eq!(names(&second), ["e", "f"]);
        let (third, token) = page(2, &token, "").take(items(&["a", "b", "e", "f", "h"]));
        assert_eq!((names(&third), token.as_str()), (vec!["h"], ""));
    }

    #[test]
    fn no_empty_page_follows_a_full_one() {
        let (full, token) = page(2, "", "").take(items(&["a", "b"]));
        assert_eq!((full.len(), token.as_str()), (2, ""));
        let (found, token) = page(1, "", "name = \"b\"").take(items(&["a", "b", "c"]));
        assert_eq!((names(&found), token.as_str()), (vec!["b"], ""));
    }

    #[test]
    fn a_token_goes_with_its_list_only() {
        let (_, token) = page(1, "", "").take(items(&["a", "b"]));
        let with = |list, parent, token: &str, filter| Page::of::<Policy>(list, parent, 1, token, filter).is_ok();
        assert!(with("policies", "tenants/default", &token, ""));
        assert!(!with("groups", "tenants/default", &token, ""));
        assert!(!with("policies", "tenants/other", &token, ""));
        assert!(!with("policies", "tenants/default", &token, "name = a"));
        for bad in ["x", "????", "AAAA", &"A".repeat(2000), &token[1..]] {
            assert!(!with("policies", "tenants/default", bad, ""), "{bad}");
        }
    }

    #[test]
    fn sizes_are_bounded() {
        assert!(Page::of::<Policy>("p", "", -1, "", "").is_err());
        assert_eq!(page(0, "", "").size, MAX_PAGE);
        assert_eq!(page(i32::MAX, "", "").size, MAX_PAGE);
    }
}
