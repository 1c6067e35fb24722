//! What is under a seal: bytes that whoever has the key can have put there, and bytes that nobody can.

use afterimage_dataplane::seal::{ControlKey, DataKey, PolicyKey, open_chunk};
use afterimage_wire::chunk::TAG_LEN;
use afterimage_wire::control::{CONTROL_LEN, CONTROL_PLAIN_LEN};
use afterimage_wire::frame::check_frame;
use afterimage_wire::ids::{IncarnationId, PolicyKeyId, StreamId};
use afterimage_wire::segment::WrappedKey;

use crate::forge::{self, Head};
use crate::formats;
use crate::input::Input;

const KEY: [u8; 32] = [3; 32];

/// A chunk of any bytes in a frame, sealed and opened; then with one byte changed, which must not open.
pub fn chunk(data: &[u8]) {
    let mut input = Input::new(data);
    let head = Head {
        stream: StreamId([1; 16]),
        incarnation: IncarnationId([2; 16]),
        number: input.below(1 << 20) + 1,
        acked: 0,
        seqs: (1, 1 + input.below(256)),
        mono_ns: input.number(0),
    };
    let change = input.below(1 << 16) as usize;
    let plain = input.take(1 << 20).to_vec();
    let frame = forge::frame(KEY, &head, std::slice::from_ref(&plain));
    let (header, directory) = check_frame(&frame).expect("as a frame must be");
    let entry = directory[0];
    let (at, len) = (entry.at.get() as usize, entry.sealed_len.get() as usize);
    let mut sealed = frame[at..at + len].to_vec();
    let opened = open_chunk(&DataKey::new(KEY), header, 0, &mut sealed).expect("under its key");
    assert_eq!(opened, plain);
    formats::chunk(opened);
    let mut changed = frame[at..at + len].to_vec();
    changed[change % (plain.len() + TAG_LEN)] ^= 1 << (change % 8);
    assert!(open_chunk(&DataKey::new(KEY), header, 0, &mut changed).is_err(), "a changed chunk opens");
}

/// Control messages: any bytes, and any bytes under the key; and a wrapped key of any bytes.
pub fn control(data: &[u8]) {
    let mut raw = [0; CONTROL_LEN];
    let len = data.len().min(CONTROL_LEN);
    raw[..len].copy_from_slice(&data[..len]);
    let _ = ControlKey::new(&KEY).open(&raw);
    let mut plain = [0; CONTROL_PLAIN_LEN];
    let len = data.len().min(CONTROL_PLAIN_LEN);
    plain[..len].copy_from_slice(&data[..len]);
    let mut key = ControlKey::new(&KEY);
    if key.open(&forge::control(KEY, 0, &plain)).is_ok() {
        assert!(key.open(&forge::control(KEY, 0, &plain)).is_err(), "the same message is taken twice");
        assert!(key.open(&forge::control(KEY, 1, &plain)).is_ok());
    }
    if let Ok(wrapped) = WrappedKey::read(&mut &data[..]) {
        let policy = PolicyKey::new(PolicyKeyId([0; 16]), KEY);
        assert!(policy.unwrap(IncarnationId([2; 16]), &wrapped).is_err(), "a key was guessed");
    }
}
