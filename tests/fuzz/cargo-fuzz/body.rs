//! Every fuzz target: the program is called as its body.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let target = afterimage_fuzz::target(env!("CARGO_BIN_NAME")).expect("a body of that name");
    (target.body)(data);
});
