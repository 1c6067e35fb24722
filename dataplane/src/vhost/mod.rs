//! vhost-user-blk: a virtual machine's disk, served by us.
//!
//! The process that runs the guest shares the guest's memory with us and tells us where the virtqueues lie; requests are
//! read from there, data goes there, and two event counters per queue say "look" in either direction. What it tells
//! comes as messages over a socket, which the owner reads; each is a [`message::Command`] for [`Server::command`].
//!
//! `proto` numbers and the configuration space · `message` messages of the socket · `chain` descriptors of one request ·
//! `queue` a virtqueue · `inflight` requests under way, kept where they outlive us · `request` what a request asks ·
//! `device` requests on their way to the disk and back · `events` kicks and calls · `control` what messages do · `server` the front end.
//!
//! The guest and whoever runs it are trusted with nothing but their own disk: every number that they give is checked,
//! and a device whose queue makes no sense stops answering, with a line in the log.

pub mod chain;
mod control;
mod device;
mod events;
pub mod inflight;
pub mod message;
pub mod proto;
pub mod queue;
pub mod request;
mod server;

pub use control::{Outcome, Reply};
pub use server::{AttachError, Counters, DeviceId, Limits, Server};
