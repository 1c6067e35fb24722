//! Fixed newstyle negotiation: bytes of the client in, bytes of the server and a verdict out.
//!
//! A machine without a socket. It never keeps more of the client's bytes than one option of [`MAX_OPTION`] bytes needs;
//! what is longer is skipped and answered with an error.

use crate::host::{DiskKey, Export};

use super::proto::{
    GREETING, MAX_PAYLOAD, MAX_PAYLOAD_UNTOLD, MAX_STRING, OPTION_HEADER, OPTION_MAGIC, OPTION_REPLY_MAGIC, be16, be32,
    be64, flag, handshake, info, option, rep,
};
use super::receive::STAGING_BYTES;

/// Longest option data that is looked at, bytes: a name of [`MAX_STRING`] and a query of that length besides. An option
/// fits into the buffer in which it is received.
pub const MAX_OPTION: usize = 12 * 1024;
/// Option data beyond this is taken for an attack, or for a client that is out of step: the connection ends.
pub const MAX_SKIP: u32 = 64 << 20;
/// The one metadata context.
pub const ALLOCATION: &str = "base:allocation";
/// The context's number in replies to `BLOCK_STATUS`.
pub const ALLOCATION_ID: u32 = 1;

/// What the client has negotiated at its entry into transmission.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entered {
    /// The chosen export.
    pub export: Export,
    /// Structured replies.
    pub structured: bool,
    /// `base:allocation` was selected for this export.
    pub allocation: bool,
    /// Longest payload of a read or write, bytes.
    pub max_payload: u32,
}

const _: () = assert!(MAX_OPTION + OPTION_HEADER <= STAGING_BYTES && MAX_OPTION >= 2 * MAX_STRING + 64);

/// Where the negotiation stands after some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// More bytes of the client are needed.
    More,
    /// The output has replies: send them, then go on with the remaining input.
    Reply,
    /// Transmission begins once the output is sent.
    Enter(Box<Entered>),
    /// Close once the output is sent.
    Close,
    /// Close now: the client broke the protocol, or asked for what cannot be answered.
    Violation(&'static str),
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
enum Stage {
    ClientFlags,
    Options,
    /// Skip so many bytes, then answer.
    Skip {
        left: u32,
        option: u32,
        reply: u32,
    },
}

/// One client's negotiation.
#[derive(Debug)]
pub struct Negotiation {
    stage: Stage,
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was selected last.
    allocation: Option<DiskKey>,
    /// The server is going away: all but `ABORT` is refused.
    shutdown: bool,
}

impl Negotiation {
    /// A new client; `out` gets the greeting.
    pub fn new(out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&GREETING.to_be_bytes());
        out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        out.extend_from_slice(&(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        Self { stage: Stage::ClientFlags, no_zeroes: false, structured: false, allocation: None, shutdown: false }
    }

    /// Refuses further options.
    pub fn shut_down(&mut self) {
        self.shutdown = true;
    }

    /// Takes at most one step. Returns how many bytes of `input` are used up, and the verdict. `exports` is asked only
    /// when an option needs them.
    pub fn step(
        &mut self,
        input: &[u8],
        exports: &mut dyn FnMut() -> Vec<Export>,
        out: &mut Vec<u8>,
    ) -> (usize, Verdict) {
        match self.stage {
            Stage::ClientFlags => {
                if input.len() < 4 {
                    return (0, Verdict::More);
                }
                let flags = be32(input);
                if flags & !u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES) != 0 {
                    return (4, Verdict::Violation("unknown client flags"));
                }
                self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
                self.stage = Stage::Options;
                (4, Verdict::Reply)
            }
            Stage::Skip { left, option, reply } => {
                let used = input.len().min(left as usize);
                let left = left - used as u32;
                if left > 0 {
                    self.stage = Stage::Skip { left, option, reply };
                    return (used, Verdict::More);
                }
                self.stage = Stage::Options;
                put_reply(out, option, reply, &[]);
                (used, if option == option::ABORT { Verdict::Close } else { Verdict::Reply })
            }
            Stage::Options => self.option_header(input, exports, out),
        }
    }

    fn option_header(
        &mut self,
        input: &[u8],
        exports: &mut dyn FnMut() -> Vec<Export>,
        out: &mut Vec<u8>,
    ) -> (usize, Verdict) {
        // The magic is judged as soon as it is there: another protocol's client need not send 16 bytes to be told.
        if input.len() >= 8 && be64(input) != OPTION_MAGIC {
            return (0, Verdict::Violation("an option without its magic number"));
        }
        if input.len() < OPTION_HEADER {
            return (0, Verdict::More);
        }
        let (number, len) = (be32(&input[8..]), be32(&input[12..]));
        let known = matches!(
            number,
            option::EXPORT_NAME
                | option::ABORT
                | option::LIST
                | option::INFO
                | option::GO
                | option::STRUCTURED_REPLY
                | option::LIST_META_CONTEXT
                | option::SET_META_CONTEXT
        );
        if number == option::EXPORT_NAME && len as usize > MAX_STRING {
            return (OPTION_HEADER, Verdict::Violation("an export name longer than the protocol allows"));
        }
        if len > MAX_SKIP {
            return (OPTION_HEADER, Verdict::Violation("an option too long to skip"));
        }
        if number == option::ABORT || !known || len as usize > MAX_OPTION {
            let reply = match number {
                // Its data is ignored, but received: a client that still sends it would not hear the answer.
                option::ABORT => rep::ACK,
                // However much of it there is: they have no data.
                option::LIST | option::STRUCTURED_REPLY => rep::ERR_INVALID,
                _ if known => rep::ERR_TOO_BIG,
                _ => rep::ERR_UNSUP,
            };
            if number == option::SET_META_CONTEXT {
                self.allocation = None; // replaced, "including when this command fails"
            }
            return self.skip(len, number, reply);
        }
        let end = OPTION_HEADER + len as usize;
        if input.len() < end {
            return (0, Verdict::More);
        }
        (end, self.option(number, &input[OPTION_HEADER..end], exports, out))
    }

    fn skip(&mut self, left: u32, option: u32, reply: u32) -> (usize, Verdict) {
        self.stage = Stage::Skip { left, option, reply };
        (OPTION_HEADER, Verdict::Reply)
    }

    fn option(
        &mut self,
        number: u32,
        data: &[u8],
        exports: &mut dyn FnMut() -> Vec<Export>,
        out: &mut Vec<u8>,
    ) -> Verdict {
        if self.shutdown {
            if number == option::EXPORT_NAME {
                return Verdict::Violation("the server is going away");
            }
            put_reply(out, number, rep::ERR_SHUTDOWN, b"the server is going away");
            return Verdict::Reply;
        }
        match number {
            option::EXPORT_NAME => {
                let Some(export) = choose(exports(), data) else {
                    return Verdict::Violation("no export of that name");
                };
                out.extend_from_slice(&export.geometry.size.to_be_bytes());
                out.extend_from_slice(&transmission_flags(&export, self.structured).to_be_bytes());
                if !self.no_zeroes {
                    out.extend_from_slice(&[0; 124]);
                }
                // This client had no way to be told how much we take: the reference client asks for 50 MB.
                self.enter(export, MAX_PAYLOAD_UNTOLD)
            }
            option::LIST => {
                if data.is_empty() {
                    for export in exports() {
                        let mut item = Vec::with_capacity(4 + export.name.len() + export.description.len());
                        item.extend_from_slice(&(export.name.len() as u32).to_be_bytes());
                        item.extend_from_slice(export.name.as_bytes());
                        item.extend_from_slice(clipped(&export.description).as_bytes());
                        put_reply(out, number, rep::SERVER, &item);
                    }
                    put_reply(out, number, rep::ACK, &[]);
                } else {
                    put_reply(out, number, rep::ERR_INVALID, b"this option has no data");
                }
                Verdict::Reply
            }
            option::STRUCTURED_REPLY => {
                if data.is_empty() {
                    self.structured = true;
                    put_reply(out, number, rep::ACK, &[]);
                } else {
                    put_reply(out, number, rep::ERR_INVALID, b"this option has no data");
                }
                Verdict::Reply
            }
            option::INFO | option::GO => self.info_or_go(number, data, exports, out),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(number, data, exports, out);
                Verdict::Reply
            }
            _ => unreachable!("unknown options are skipped by their header"),
        }
    }

    fn enter(&self, export: Export, max_payload: u32) -> Verdict {
        let allocation = self.structured && self.allocation == Some(export.key);
        Verdict::Enter(Box::new(Entered { export, structured: self.structured, allocation, max_payload }))
    }

    fn info_or_go(
        &mut self,
        number: u32,
        data: &[u8],
        exports: &mut dyn FnMut() -> Vec<Export>,
        out: &mut Vec<u8>,
    ) -> Verdict {
        let mut input = Fields(data);
        let parsed = (|| {
            let name = input.string()?;
            let count = usize::from(input.u16()?);
            (input.0.len() == 2 * count).then_some(name)
        })();
        let Some(name) = parsed else {
            put_reply(out, number, rep::ERR_INVALID, b"the lengths within the option do not fit");
            return Verdict::Reply;
        };
        if name.len() > MAX_STRING {
            put_reply(out, number, rep::ERR_TOO_BIG, b"the export name is too long");
            return Verdict::Reply;
        }
        let Some(export) = choose(exports(), name) else {
            put_reply(out, number, rep::ERR_UNKNOWN, b"no export of that name");
            return Verdict::Reply;
        };
        let wanted = |kind: u16| input.0.chunks_exact(2).any(|two| be16(two) == kind);

        let mut item = Vec::with_capacity(64);
        item.extend_from_slice(&info::EXPORT.to_be_bytes());
        item.extend_from_slice(&export.geometry.size.to_be_bytes());
        item.extend_from_slice(&transmission_flags(&export, self.structured).to_be_bytes());
        put_reply(out, number, rep::INFO, &item);
        if wanted(info::NAME) {
            item.clear();
            item.extend_from_slice(&info::NAME.to_be_bytes());
            item.extend_from_slice(export.name.as_bytes());
            put_reply(out, number, rep::INFO, &item);
        }
        if wanted(info::DESCRIPTION) {
            item.clear();
            item.extend_from_slice(&info::DESCRIPTION.to_be_bytes());
            item.extend_from_slice(clipped(&export.description).as_bytes());
            put_reply(out, number, rep::INFO, &item);
        }
        if wanted(info::BLOCK_SIZE) {
            item.clear();
            item.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
            for value in [1, preferred_block(&export), MAX_PAYLOAD] {
                item.extend_from_slice(&value.to_be_bytes());
            }
            put_reply(out, number, rep::INFO, &item);
        }
        put_reply(out, number, rep::ACK, &[]);
        if number != option::GO {
            return Verdict::Reply;
        }
        // Only a client that asked for the sizes is bound by them.
        let max_payload = if wanted(info::BLOCK_SIZE) { MAX_PAYLOAD } else { MAX_PAYLOAD_UNTOLD };
        self.enter(export, max_payload)
    }

    fn meta_context(&mut self, number: u32, data: &[u8], exports: &mut dyn FnMut() -> Vec<Export>, out: &mut Vec<u8>) {
        let set = number == option::SET_META_CONTEXT;
        if set {
            self.allocation = None; // whatever comes of it: the option replaces what was selected
            if !self.structured {
                put_reply(out, number, rep::ERR_INVALID, b"structured replies come first");
                return;
            }
        }
        let mut input = Fields(data);
        let parsed = (|| {
            let name = input.string()?;
            let count = input.u32()?;
            let mut matched = !set && count == 0;
            for _ in 0..count {
                let query = input.string()?;
                matched |= query == ALLOCATION.as_bytes() || (!set && query == b"base:");
            }
            input.0.is_empty().then_some((name, matched))
        })();
        let Some((name, matched)) = parsed else {
            put_reply(out, number, rep::ERR_INVALID, b"the lengths within the option do not fit");
            return;
        };
        if name.len() > MAX_STRING {
            put_reply(out, number, rep::ERR_TOO_BIG, b"the export name is too long");
            return;
        }
        let Some(export) = choose(exports(), name) else {
            put_reply(out, number, rep::ERR_UNKNOWN, b"no export of that name");
            return;
        };
        if matched {
            let mut item = Vec::with_capacity(4 + ALLOCATION.len());
            item.extend_from_slice(&if set { ALLOCATION_ID } else { 0 }.to_be_bytes());
            item.extend_from_slice(ALLOCATION.as_bytes());
            put_reply(out, number, rep::META_CONTEXT, &item);
            if set {
                self.allocation = Some(export.key);
            }
        }
        put_reply(out, number, rep::ACK, &[]);
    }
}

/// The export of that name; with the empty name the only export, if there is exactly one.
fn choose(mut exports: Vec<Export>, name: &[u8]) -> Option<Export> {
    if name.is_empty() && exports.len() == 1 {
        return exports.pop();
    }
    exports.into_iter().find(|e| e.name.as_bytes() == name)
}

/// What an export can do, as its clients are told.
pub fn transmission_flags(export: &Export, structured: bool) -> u16 {
    // One disk layer serves all connections, so a flush or FUA on one covers the writes of all (multi-conn).
    let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
    if export.geometry.read_only {
        flags |= flag::READ_ONLY;
    } else {
        flags |= flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        if export.geometry.discard {
            flags |= flag::SEND_TRIM;
        }
    }
    if structured {
        flags |= flag::SEND_DF;
    }
    flags
}

/// Requests of this size and alignment need no read-modify-write.
fn preferred_block(export: &Export) -> u32 {
    export.geometry.physical_block.max(export.geometry.block).clamp(4096, 1 << 25).next_power_of_two()
}

/// Not longer than a string of the protocol may be.
fn clipped(text: &str) -> &str {
    let mut end = text.len().min(MAX_STRING);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn put_reply(out: &mut Vec<u8>, number: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// Fields of option data, one after the other; none past the end.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.bytes(2).map(be16)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes(4).map(be32)
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(len as usize)
    }
}
