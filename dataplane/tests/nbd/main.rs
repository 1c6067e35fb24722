//! The NBD front end in the simulated world: a client's bytes in, a disk in memory behind it, the client's bytes out.

mod bed;
mod copies;
mod hostile;
mod negotiation;
mod requests;
mod room;
mod soak;
mod text;
