//! What the kernel must have, and how its lack is named.

use crate::io::Errno;

/// Why there is no ring. Each names what is missing and what to do.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// No io_uring at all.
    #[error(
        "io_uring cannot be used here ({0}): a kernel since Linux 6.1 with io_uring is needed, the sysctl kernel.io_uring_disabled must be 0, and no seccomp profile may forbid it"
    )]
    Unavailable(Errno),
    /// A setup flag that the kernel does not know.
    #[error("this kernel's io_uring lacks {flag}, which Linux has since {since}")]
    SetupFlag {
        /// The flag.
        flag: &'static str,
        /// First Linux version with it.
        since: &'static str,
    },
    /// A feature that the kernel does not report.
    #[error("this kernel's io_uring lacks the feature {0}")]
    Feature(&'static str),
    /// An operation that the kernel does not know.
    #[error("this kernel's io_uring lacks the operation {0}")]
    Opcode(&'static str),
    /// The limit on locked memory is too low.
    #[error(
        "the buffers need {need} bytes of locked memory, the limit is {limit}: set LimitMEMLOCK=infinity in the service's unit, or `ulimit -l unlimited`, or give the process CAP_IPC_LOCK, or make the buffers smaller"
    )]
    LockedMemory {
        /// Bytes needed.
        need: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// Another failure of the kernel.
    #[error("{what}: {errno}")]
    Os {
        /// While doing this.
        what: &'static str,
        /// As the kernel gave it.
        errno: Errno,
    },
}
