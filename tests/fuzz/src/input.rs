//! The fuzzer's bytes, read as choices. Reading past the end gives zeros, so that every input means something and a
//! shorter one is simpler.

/// Numbers at which code breaks: ends of ranges, powers of two, block sizes and their neighbours.
const EDGES: [u64; 24] = [
    0,
    1,
    2,
    255,
    256,
    511,
    512,
    513,
    4095,
    4096,
    4097,
    65_535,
    65_536,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_f000,
    0xffff_ffff,
    0x1_0000_0000,
    (1 << 62) - 1,
    1 << 62,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 4095,
    u64::MAX,
];

/// What is left of the bytes.
#[derive(Debug, Clone)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of them.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes, at most `most`.
    pub fn take(&mut self, most: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(most.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let taken = self.take(N);
        out[..taken.len()].copy_from_slice(taken);
        out
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Two bytes.
    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Sixteen bytes: mostly one of a few, so that two ids are often the same.
    pub fn id(&mut self) -> [u8; 16] {
        let tag = self.byte();
        if tag == 0xff { self.array() } else { [tag % 12; 16] }
    }

    /// A number below `end` (0 if that is 0).
    pub fn below(&mut self, end: u64) -> u64 {
        let number = if end <= 256 { u64::from(self.byte()) } else { u64::from(u32::from_le_bytes(self.array())) };
        if end == 0 { 0 } else { number % end }
    }

    /// One in two.
    pub fn flag(&mut self) -> bool {
        self.byte() & 1 == 1
    }

    /// A number: small, at an edge, near `around`, or any.
    pub fn number(&mut self, around: u64) -> u64 {
        match self.byte() {
            choice @ 0..=63 => u64::from(choice),
            choice @ 64..=127 => EDGES[usize::from(choice - 64) % EDGES.len()],
            choice @ 128..=223 => around.wrapping_add(u64::from(choice)).wrapping_sub(176),
            _ => u64::from_le_bytes(self.array()),
        }
    }
}
