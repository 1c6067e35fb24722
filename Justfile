# The usual tasks. `just` lists them.

_list:
    @just --list

# The programs, as users run them.
build:
    cargo build --release

# The program as one file that needs nothing of its host: target/release/afterimage.
static:
    cargo rustc --release --locked -p afterimage --bin afterimage -- -C target-feature=+crt-static

# Every check, or the parts named: lint docs unit sim clients guests postgres api fuzz demo bench-smoke.
test *parts:
    tests/all {{ parts }}

# Seeds of the simulator; `just sim 1000`.
sim seeds="200":
    tests/sim --seeds {{ seeds }}

# Hostile bytes for everything that reads bytes of others: each body for so long; `just fuzz 3600`.
fuzz seconds="60":
    cargo run --release -p afterimage-fuzz -- --seconds {{ seconds }}

# The same under libFuzzer with its address sanitizer (nightly, cargo-fuzz): `just libfuzzer frame -max_total_time=60`.
# What it finds new in coverage goes to target/corpus.
libfuzzer target *args:
    mkdir -p target/corpus/{{ target }} tests/fuzz/corpus/{{ target }}
    cd tests/fuzz && cargo +nightly fuzz run --fuzz-dir cargo-fuzz {{ target }} \
        ../../target/corpus/{{ target }} corpus/{{ target }} -- {{ args }}

# Formatting and lints only.
lint:
    tests/all lint

# What the product does, in under 90 seconds.
demo *args:
    cargo run --release -- demo {{ args }}

# Criterion benches of the pure stages.
bench *filter:
    cargo bench -p afterimage-benches -- {{ filter }}

# The documentation of the crates.
docs:
    cargo doc --workspace --no-deps --open
