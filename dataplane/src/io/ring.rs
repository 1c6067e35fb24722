//! Raw io_uring.
