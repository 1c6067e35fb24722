//! The coordinator: what should be (policies, groups), what is (reports of proxies), and what is being done about it
//! (operations). It stands at a group's target or at a third site; replication goes on without it.

pub mod bundle;
pub mod ca;
pub mod client;
pub mod convert;
pub mod names;
pub mod problem;
pub mod token;
