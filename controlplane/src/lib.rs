//! The coordinator: what should be (policies, groups), what is (reports of proxies), and what is being done about it
//! (operations). It stands at a group's target or at a third site; replication goes on without it.

pub mod audit;
pub mod authorities;
pub mod backup;
mod beside;
pub mod bundle;
pub mod ca;
pub mod certificates;
pub mod client;
pub mod connections;
pub mod convert;
pub mod coordinator;
pub mod desired;
pub mod escrow;
pub mod eventlog;
pub mod events;
pub mod failover;
pub mod fields;
pub mod filter;
pub mod group;
pub mod grpc;
pub mod history;
pub mod hooks;
pub mod hours;
pub mod keys;
pub mod live;
pub mod machine;
pub mod metrics;
pub mod model;
pub mod names;
pub mod objects;
pub mod paging;
pub mod placement;
pub mod policy;
pub mod problem;
pub mod requests;
pub mod restore;
pub mod reverse;
pub mod rpo;
pub mod sessions;
pub mod status;
pub mod store;
mod text;
pub mod token;
pub mod wrapping;

pub use grpc::{Config, Running, ServeError, serve, start, start_over};
