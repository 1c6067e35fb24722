//! NBD front end: fixed newstyle negotiation and the transmission phase, as a synchronous machine over [`crate::io::Io`].
//!
//! In the order in which a connection meets them:
//! - [`server`]: what an owner of disks drives; connections, answers to their connection, timers, limits.
//! - [`negotiate`]: options, until an export is chosen.
//! - [`receive`]: bytes in, payload where the disk wants it.
//! - [`conn`]: requests judged and given to the disk in parts ([`request`]); [`status`]: extents.
//! - [`answer`]: what the disk answers, and reads.
//! - [`reply`]: bytes out, gathered.
//! - [`proto`]: numbers and layouts of the protocol.

pub(crate) mod answer;
pub(crate) mod conn;
pub mod negotiate;
pub mod proto;
pub(crate) mod receive;
pub(crate) mod reply;
pub(crate) mod request;
pub mod server;
pub(crate) mod status;

pub use server::{AttachError, Counters, Limits, Server};
