//! Every body, in the time that continuous integration has: the corpus, mutations of it, and random bytes that proptest
//! makes smaller when they fail.

use afterimage_fuzz::{TARGETS, soak, target};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Inputs of each kind for a body of weight 1.
const INPUTS: u32 = 3000;

fn short_run(name: &str) {
    let target = target(name).expect("listed");
    let inputs = (INPUTS / target.weight).max(20);
    let seeds = soak::files(&soak::home().join("corpus").join(name)).len() as u64;
    if let Err(failure) = soak::run(target, 1, |done| done >= u64::from(inputs) + seeds) {
        panic!("{name}: input {} fails: {:02x?}", failure.number, failure.input);
    }
    let config = Config { cases: inputs, failure_persistence: None, max_shrink_time: 20_000, ..Config::default() };
    let longest = if target.weight == 1 { 600 } else { 200 };
    TestRunner::new(config)
        .run(&prop::collection::vec(any::<u8>(), 0..longest), |bytes| {
            (target.body)(&bytes);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{name}: {error}"));
}

macro_rules! bodies {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            short_run(stringify!($name));
        })*

        #[test]
        fn every_body_is_run() {
            let run = [$(stringify!($name)),*];
            for target in TARGETS {
                assert!(run.contains(&target.name), "{} is not run here", target.name);
            }
        }
    };
}

bodies! {
    record chunk frame segment handshake control intent timeline stream_state damage
    sealed_chunk sealed_control
    nbd_options nbd_requests ublk
    vhost_messages vhost_queues
    stream journal link intent_log orders
    config names objects
    grpc grpc_calls
}
