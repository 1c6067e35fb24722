//! The vhost-user front end in the simulated world: a driver's queues in, a disk in memory behind it, their ends back.

mod bed;
mod control;
mod hostile;
mod replay;
mod requests;
mod straight;
mod text;
