//! Everything in Afterimage that reads bytes of others, as functions of bytes. A body must end without a panic whatever
//! it is given, and holds what comes out against what must be true of it.
//!
//! | module | what is fed |
//! |---|---|
//! | [`formats`] | every structure of `docs/format.md`, as it is and with its checksum set right |
//! | [`sealed`] | chunks and control messages under the right key, frames and keys under none |
//! | [`nbd`] | options and requests of NBD, through a server with a disk |
//! | [`ublk`] | requests of a kernel, through a ublk device with a disk |
//! | [`vhost`] | messages of vhost-user, and a guest's memory, through a front end with a disk |
//! | [`stream`] | a target that receives from a source which holds the right keys |
//! | [`journal`] | a target that finds its files changed |
//! | [`link`] | a source whose target holds the right keys |
//! | [`log`] | a source that finds its write-intent log changed |
//! | [`orders`] | a source and a target that are told what makes no sense |
//! | [`text`] | configuration, names, tokens, bundles, stored objects |
//! | [`grpc`] | messages of the API, through a coordinator |
//!
//! The same bodies run under libFuzzer (`tests/fuzz/cargo-fuzz`), under [`soak`] (`cargo run -p afterimage-fuzz`), and
//! over the corpus and under proptest in `cargo test`.

// Two front ends are tried with the same disk in memory.
#![allow(clippy::duplicate_mod)]

pub mod forge;
pub mod formats;
pub mod grpc;
pub mod input;
pub mod journal;
pub mod link;
pub mod log;
pub mod nbd;
pub mod orders;
pub mod sealed;
pub mod soak;
pub mod stream;
pub mod text;
pub mod ublk;
pub mod vhost;

/// A body and its name, which is also its corpus folder's.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Name.
    pub name: &'static str,
    /// Takes any bytes.
    pub body: fn(&[u8]),
    /// Runs in the time that others take once, about.
    pub weight: u32,
}

/// All bodies.
pub const TARGETS: &[Target] = &[
    Target { name: "record", body: formats::record, weight: 1 },
    Target { name: "chunk", body: formats::chunk, weight: 1 },
    Target { name: "frame", body: formats::frame, weight: 1 },
    Target { name: "segment", body: formats::segment, weight: 1 },
    Target { name: "handshake", body: formats::handshake, weight: 1 },
    Target { name: "control", body: formats::control, weight: 1 },
    Target { name: "intent", body: formats::intent, weight: 1 },
    Target { name: "timeline", body: formats::timeline, weight: 1 },
    Target { name: "stream_state", body: formats::stream_state, weight: 1 },
    Target { name: "damage", body: formats::damage, weight: 1 },
    Target { name: "sealed_chunk", body: sealed::chunk, weight: 1 },
    Target { name: "sealed_control", body: sealed::control, weight: 1 },
    Target { name: "nbd_options", body: nbd::options, weight: 20 },
    Target { name: "nbd_requests", body: nbd::requests, weight: 20 },
    Target { name: "ublk", body: ublk::body, weight: 20 },
    Target { name: "vhost_messages", body: vhost::messages, weight: 20 },
    Target { name: "vhost_queues", body: vhost::queues, weight: 20 },
    Target { name: "stream", body: stream::body, weight: 50 },
    Target { name: "journal", body: journal::body, weight: 50 },
    Target { name: "link", body: link::body, weight: 50 },
    Target { name: "intent_log", body: log::body, weight: 50 },
    Target { name: "orders", body: orders::body, weight: 50 },
    Target { name: "config", body: text::config, weight: 2 },
    Target { name: "names", body: text::names, weight: 1 },
    Target { name: "objects", body: text::objects, weight: 1 },
    Target { name: "grpc", body: grpc::messages, weight: 1 },
    Target { name: "grpc_calls", body: grpc::calls, weight: 50 },
];

/// The body of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}
