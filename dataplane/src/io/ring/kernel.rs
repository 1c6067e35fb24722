//! What the kernel must have, and how its lack is named.

use io_uring::{Builder, IoUring, Probe, opcode};
use rustix::process::{Resource, getrlimit};

use super::RingConfig;
use crate::io::Errno;

/// Why there is no ring. Each names what is missing and what to do.
#[derive(Copy, Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// No io_uring at all.
    #[error(
        "io_uring cannot be used here ({0}): it needs Linux 6.1 or later, the sysctl kernel.io_uring_disabled at 0, and no \
         seccomp profile that forbids it"
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
    #[error("this kernel's io_uring lacks the feature {0}; Linux 6.1 and later have it")]
    Feature(&'static str),
    /// An operation that the kernel does not know.
    #[error("this kernel's io_uring lacks the operation {0}; Linux 6.1 and later have it")]
    Opcode(&'static str),
    /// The limit on locked memory is too low.
    #[error(
        "the buffers need {need} bytes of locked memory, and the limit is {limit}: set LimitMEMLOCK=infinity in the \
         service's unit (or `ulimit -l unlimited`), give the process CAP_IPC_LOCK, or make the buffers smaller"
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

impl RingError {
    pub(super) fn os(what: &'static str, error: impl Into<std::io::Error>) -> Self {
        Self::Os { what, errno: errno(&error.into()) }
    }
}

pub(super) fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::IO, Errno)
}

/// Completion queue entries for each submission queue entry: continuations and receives that stay open come on top of
/// what is submitted together. The kernel keeps what does not fit.
const COMPLETIONS_PER_ENTRY: u32 = 4;

/// A ring with all that is needed, or what is missing.
pub(super) fn build(config: &RingConfig) -> Result<IoUring, RingError> {
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_clamp()
        .setup_cqsize(config.entries.saturating_mul(COMPLETIONS_PER_ENTRY))
        .build(config.entries)
        .map_err(|e| name_missing_flag(&e))?;
    check_features(&ring)?;
    check_opcodes(&ring)?;
    Ok(ring)
}

/// Whether the kernel has all that a ring needs, without making one that stays.
///
/// # Errors
/// The first thing that is missing.
pub fn check_kernel() -> Result<(), RingError> {
    build(&RingConfig { entries: 4, ..RingConfig::default() }).map(drop)
}

/// The kernel says only EINVAL: which of the flags it does not know is found by trying them one by one, oldest first.
fn name_missing_flag(error: &std::io::Error) -> RingError {
    let os = RingError::Os { what: "setting up an io_uring", errno: errno(error) };
    match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => return RingError::Unavailable(errno(error)),
        Some(libc::EINVAL) => {}
        _ => return os,
    }
    let mut builder: Builder = IoUring::builder();
    builder.setup_clamp();
    if builder.build(2).is_err() {
        return RingError::SetupFlag { flag: "IORING_SETUP_CLAMP", since: "5.6" };
    }
    builder.setup_submit_all();
    if builder.build(2).is_err() {
        return RingError::SetupFlag { flag: "IORING_SETUP_SUBMIT_ALL", since: "5.18" };
    }
    if builder.clone().setup_coop_taskrun().setup_taskrun_flag().build(2).is_err() {
        return RingError::SetupFlag { flag: "IORING_SETUP_TASKRUN_FLAG", since: "5.19" };
    }
    builder.setup_single_issuer();
    if builder.build(2).is_err() {
        return RingError::SetupFlag { flag: "IORING_SETUP_SINGLE_ISSUER", since: "6.0" };
    }
    if builder.setup_defer_taskrun().setup_taskrun_flag().build(2).is_err() {
        return RingError::SetupFlag { flag: "IORING_SETUP_DEFER_TASKRUN", since: "6.1" };
    }
    os
}

fn check_features(ring: &IoUring) -> Result<(), RingError> {
    let params = ring.params();
    let features = [
        (params.is_feature_nodrop(), "IORING_FEAT_NODROP"),
        (params.is_feature_submit_stable(), "IORING_FEAT_SUBMIT_STABLE"),
        (params.is_feature_fast_poll(), "IORING_FEAT_FAST_POLL"),
        (params.is_feature_ext_arg(), "IORING_FEAT_EXT_ARG"),
        (params.is_feature_native_workers(), "IORING_FEAT_NATIVE_WORKERS"),
        (params.is_feature_resource_tagging(), "IORING_FEAT_RSRC_TAGS"),
    ];
    match features.iter().find(|(there, _)| !there) {
        Some((_, name)) => Err(RingError::Feature(name)),
        None => Ok(()),
    }
}

fn check_opcodes(ring: &IoUring) -> Result<(), RingError> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|e| RingError::os("asking io_uring for its operations", e))?;
    let needed = [
        (opcode::Read::CODE, "IORING_OP_READ"),
        (opcode::Write::CODE, "IORING_OP_WRITE"),
        (opcode::ReadFixed::CODE, "IORING_OP_READ_FIXED"),
        (opcode::WriteFixed::CODE, "IORING_OP_WRITE_FIXED"),
        (opcode::Fsync::CODE, "IORING_OP_FSYNC"),
        (opcode::Fallocate::CODE, "IORING_OP_FALLOCATE"),
        (opcode::Recv::CODE, "IORING_OP_RECV"),
        (opcode::Send::CODE, "IORING_OP_SEND"),
        (opcode::RecvMsg::CODE, "IORING_OP_RECVMSG"),
        (opcode::SendMsg::CODE, "IORING_OP_SENDMSG"),
        (opcode::AsyncCancel2::CODE, "IORING_OP_ASYNC_CANCEL"),
    ];
    match needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
        Some((_, name)) => Err(RingError::Opcode(name)),
        None => Ok(()),
    }
}

/// What a failed registration of the buffers means: usually the limit on locked memory.
pub(super) fn name_registration(error: std::io::Error, need: u64) -> RingError {
    let limit = getrlimit(Resource::Memlock).current;
    match (error.raw_os_error(), limit) {
        (Some(libc::ENOMEM), Some(limit)) if limit < need => RingError::LockedMemory { need, limit },
        _ => RingError::os("registering the buffers with io_uring", error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_can_be_built_here() {
        build(&RingConfig::default()).unwrap();
    }

    #[test]
    fn the_lack_of_io_uring_is_named() {
        let refused = name_missing_flag(&std::io::Error::from_raw_os_error(libc::EPERM));
        assert!(refused.to_string().contains("kernel.io_uring_disabled"), "{refused}");
        assert!(name_missing_flag(&std::io::Error::from_raw_os_error(libc::ENOSYS)).to_string().contains("6.1"));
    }

    #[test]
    fn the_limit_on_locked_memory_is_named() {
        let named = RingError::LockedMemory { need: 1 << 30, limit: 8 << 20 }.to_string();
        assert!(named.contains("1073741824") && named.contains("8388608") && named.contains("LimitMEMLOCK"));
    }
}
