//! Descriptors that whoever started this process left open for it (systemd's socket activation).

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

/// The first descriptor that systemd passes on.
const FIRST: RawFd = 3;
/// Most that are taken.
pub const INHERITED_MAX: usize = 64;

/// Copies of the first `count` descriptors that were passed on, in their order. The originals stay open until the process
/// ends, so that a socket's queue of clients does not end with its copy; programs that are started do not get them.
///
/// Call it before anything else of the process has been opened: what is open there later is not what was passed on.
///
/// # Errors
/// `count` is above [`INHERITED_MAX`], one of them is not open, or no descriptor is left.
pub fn inherited(count: usize) -> io::Result<Vec<OwnedFd>> {
    if count > INHERITED_MAX {
        return Err(io::Error::other(format!("{count} descriptors; at most {INHERITED_MAX} are taken")));
    }
    (FIRST..).take(count).map(copy).collect()
}

fn copy(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `number` is not -1. The borrow ends with this function, which hands it to two calls that fail with EBADF where
    // nothing is open. If it is open, nobody in this process owns it (it came from the parent), so nobody closes it meanwhile.
    let given = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(given, rustix::io::FdFlags::CLOEXEC)?;
    given.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_is_taken_is_refused() {
        assert!(inherited(INHERITED_MAX + 1).unwrap_err().to_string().contains("65 descriptors"));
        assert!(inherited(0).unwrap().is_empty());
    }

    #[test]
    fn what_is_not_open_is_an_error() {
        assert_eq!(copy(RawFd::MAX).unwrap_err().raw_os_error(), Some(9));
    }
}
