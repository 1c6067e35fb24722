//! A small blocking NBD client (fixed newstyle, simple replies) for the demo's writer and checker: the same protocol
//! that any client speaks, several requests in flight.

use std::io::{self, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const FLAG_FUA: u16 = 1;

/// A connection to one export.
pub struct Client {
    input: BufReader<UnixStream>,
    output: UnixStream,
    next: u64,
    request: Vec<u8>,
    size: u64,
}

/// The handle of a request in flight.
#[derive(Copy, Clone, PartialEq, Eq, Debug)]
pub struct Handle(u64);

impl Client {
    /// Connects to `export` at a Unix socket; every step is bounded by `timeout`.
    ///
    /// # Errors
    /// No server, no such export, or a server that does not speak the protocol.
    pub fn connect(socket: &Path, export: &str, timeout: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let mut input = BufReader::with_capacity(64 * 1024, stream.try_clone()?);
        let mut output = stream;
        if u64_of(&mut input)? != NBDMAGIC || u64_of(&mut input)? != IHAVEOPT {
            return Err(protocol("the server does not speak fixed newstyle NBD"));
        }
        let flags = u16_of(&mut input)?;
        if flags & 1 == 0 {
            return Err(protocol("the server does not offer fixed newstyle"));
        }
        let mut hello = Vec::new();
        hello.extend((u32::from(flags) & 3).to_be_bytes());
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend((export.len() as u32 + 6).to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        hello.extend(0u16.to_be_bytes());
        output.write_all(&hello)?;
        let mut size = 0;
        loop {
            if u64_of(&mut input)? != REPLY_MAGIC {
                return Err(protocol("bad magic in an option's reply"));
            }
            let (_option, kind, length) = (u32_of(&mut input)?, u32_of(&mut input)?, u32_of(&mut input)?);
            let mut body = vec![0; length.min(65536) as usize];
            input.read_exact(&mut body)?;
            match kind {
                REP_ACK => break,
                REP_INFO if body.len() >= 12 && body[..2] == [0, 0] => {
                    size = u64::from_be_bytes(body[2..10].try_into().expect("8 bytes"));
                }
                REP_INFO => {}
                _ => {
                    let text = String::from_utf8_lossy(&body).into_owned();
                    return Err(protocol(&format!("export `{export}` was refused ({:#x}): {text}", kind)));
                }
            }
        }
        Ok(Self { input, output, next: 1, request: Vec::with_capacity(28), size })
    }

    /// Bytes of the export.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn header(&mut self, flags: u16, command: u16, offset: u64, length: u32) -> Handle {
        let handle = self.next;
        self.next += 1;
        self.request.clear();
        self.request.extend(REQUEST_MAGIC.to_be_bytes());
        self.request.extend(flags.to_be_bytes());
        self.request.extend(command.to_be_bytes());
        self.request.extend(handle.to_be_bytes());
        self.request.extend(offset.to_be_bytes());
        self.request.extend(length.to_be_bytes());
        Handle(handle)
    }

    /// Sends a write; its answer comes by [`Client::answer`].
    ///
    /// # Errors
    /// The connection broke.
    pub fn send_write(&mut self, offset: u64, data: &[u8], fua: bool) -> io::Result<Handle> {
        let handle = self.header(if fua { FLAG_FUA } else { 0 }, CMD_WRITE, offset, data.len() as u32);
        self.request.extend_from_slice(data);
        self.output.write_all(&self.request)?;
        Ok(handle)
    }

    /// Waits for the next answer of a request without data.
    ///
    /// # Errors
    /// The connection broke, or the server answered with an error.
    pub fn answer(&mut self) -> io::Result<Handle> {
        if u32_of(&mut self.input)? != SIMPLE_REPLY_MAGIC {
            return Err(protocol("bad magic in a reply"));
        }
        let error = u32_of(&mut self.input)?;
        let handle = u64_of(&mut self.input)?;
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error as i32));
        }
        Ok(Handle(handle))
    }

    /// Flushes; no other request may be in flight.
    ///
    /// # Errors
    /// The connection broke, or the disk's flush failed.
    pub fn flush(&mut self) -> io::Result<()> {
        self.header(0, CMD_FLUSH, 0, 0);
        self.output.write_all(&self.request)?;
        self.answer().map(drop)
    }

    /// Reads; no other request may be in flight.
    ///
    /// # Errors
    /// The connection broke, or the disk's read failed.
    pub fn read(&mut self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.header(0, CMD_READ, offset, out.len() as u32);
        self.output.write_all(&self.request)?;
        self.answer()?;
        self.input.read_exact(out)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.header(0, CMD_DISC, 0, 0);
        let _ = self.output.write_all(&self.request); // the server may be gone: nothing to tell it then
    }
}

fn protocol(text: &str) -> io::Error {
    io::Error::other(text.to_owned())
}

fn u64_of(input: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

fn u32_of(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn u16_of(input: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    input.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}
