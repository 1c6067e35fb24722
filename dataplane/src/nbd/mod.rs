//! NBD front end: fixed newstyle negotiation and the transmission phase, as a synchronous machine over [`crate::io::Io`].
//!
//! - [`server`]: the machine that an owner of disks drives: [`Server`].

pub mod server;

pub use server::{AttachError, Counters, ExportStatus, Limits, Server};
