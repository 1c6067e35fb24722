//! The keys file: what a target keeps beside a journal so that it can be opened there with source and coordinator gone.
//! Policy keys lie in it sealed twice: under the site's key, and under the recovery key that the operator holds.
//!
//! A file that is replaced as a whole, before anything is acknowledged that needs a key that comes new into it. A key is
//! never taken out of it.
//!
//! ```text
//!   0  magic "AIKS"   4 version u16   6 reserved u16   8 crc u32 (with this field 0)   12 length u32
//!  16  stream [16]   32 site key [16]   48 recovery key [16]; zeros: there is none
//!  64  retention_s u64   72 key_count u16, disk_count u16, reserved u32
//!  80  name of the group, then keys, then disks
//! ```

use bytes::{Buf, BufMut};

use crate::ids::{PolicyKeyId, StreamId};
use crate::record::DiskInfo;
use crate::{FormatError, MAX_DISKS, MAX_NAME, WIRE_VERSION, finished, get_id, get_number, get_str, need, put_str};

/// First bytes of the file.
pub const KEYS_MAGIC: [u8; 4] = *b"AIKS";
/// Most keys of one stream.
pub const MAX_KEYS: usize = 256;
/// A sealed policy key: nonce 12, sealed key 32, tag 16.
pub const SEALED_KEY_LEN: usize = 60;

/// A policy key, sealed.
pub type SealedKey = [u8; SEALED_KEY_LEN];

/// A policy key as the file has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HeldKey {
    /// Its id, as in heads of segments.
    pub id: PolicyKeyId,
    /// Under the site's key.
    pub site: SealedKey,
    /// Under the recovery key.
    pub recovery: Option<SealedKey>,
}

/// The file, taken apart.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KeysFile {
    /// Stream.
    pub stream: StreamId,
    /// Which key of the site.
    pub site_key: [u8; 16],
    /// Which recovery key; zeros for none.
    pub recovery_key: [u8; 16],
    /// How long every write is kept, seconds.
    pub retention_s: u64,
    /// Of the group.
    pub name: String,
    /// Newest first.
    pub keys: Vec<HeldKey>,
    /// Its disks, each with the generation that was told last.
    pub disks: Vec<(DiskInfo, u64)>,
}

impl KeysFile {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_slice(&KEYS_MAGIC);
        out.put_u16_le(WIRE_VERSION);
        out.put_u16_le(0);
        out.put_u64_le(0); // CRC and length, below
        out.put_slice(&self.stream.0);
        out.put_slice(&self.site_key);
        out.put_slice(&self.recovery_key);
        out.put_u64_le(self.retention_s);
        out.put_u16_le(self.keys.len() as u16);
        out.put_u16_le(self.disks.len() as u16);
        out.put_u32_le(0);
        put_str(&mut out, &self.name);
        for key in &self.keys {
            out.put_slice(&key.id.0);
            out.put_u8(key.recovery.is_some().into());
            out.put_slice(&key.site);
            out.put_slice(&key.recovery.unwrap_or([0; SEALED_KEY_LEN]));
        }
        for (disk, generation) in &self.disks {
            disk.encode(&mut out);
            out.put_u64_le(*generation);
        }
        crate::close_table(&mut out);
        out
    }

    /// Reads a file; what follows its length is ignored.
    ///
    /// # Errors
    /// Foreign, damaged, of another version, or senseless.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "keys file";
        let bad = |detail| FormatError::Malformed { what: WHAT, detail };
        let bytes = crate::open_table(bytes, KEYS_MAGIC, WHAT)?;
        let mut input = &bytes[16..];
        let stream = StreamId(get_id(&mut input, WHAT)?);
        let (site_key, recovery_key) = (get_id(&mut input, WHAT)?, get_id(&mut input, WHAT)?);
        need(&input, 16, WHAT)?;
        let retention_s = get_number(&mut input, WHAT)?;
        let (key_count, disk_count) = (usize::from(input.get_u16_le()), usize::from(input.get_u16_le()));
        if input.get_u32_le() != 0 {
            return Err(bad("reserved bits set"));
        }
        if key_count > MAX_KEYS || disk_count > MAX_DISKS {
            return Err(bad("too many entries"));
        }
        let name = get_str(&mut input, WHAT, MAX_NAME)?;
        let mut keys = Vec::with_capacity(key_count);
        for _ in 0..key_count {
            need(&input, 17 + 2 * SEALED_KEY_LEN, WHAT)?;
            let id = PolicyKeyId(get_id(&mut input, WHAT)?);
            let has = input.get_u8();
            let (mut site, mut recovery) = ([0; SEALED_KEY_LEN], [0; SEALED_KEY_LEN]);
            input.copy_to_slice(&mut site);
            input.copy_to_slice(&mut recovery);
            let recovery = match has {
                0 if recovery == [0; SEALED_KEY_LEN] => None,
                1 => Some(recovery),
                _ => return Err(bad("unknown bits")),
            };
            keys.push(HeldKey { id, site, recovery });
        }
        let mut disks = Vec::with_capacity(disk_count);
        for _ in 0..disk_count {
            let disk = DiskInfo::read(&mut input)?;
            need(&input, 8, WHAT)?;
            disks.push((disk, get_number(&mut input, WHAT)?));
        }
        finished(&input, WHAT)?;
        Ok(Self { stream, site_key, recovery_key, retention_s, name, keys, disks })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::DiskId;

    #[test]
    fn a_file_that_ends_early_is_refused_wherever_it_ends() {
        let disk = DiskInfo {
            slot: 3,
            id: DiskId([7; 16]),
            size: 1 << 30,
            block: 512,
            physical_block: 4096,
            serial: "s".into(),
            name: "data".into(),
        };
        let key = |recovery| HeldKey { id: PolicyKeyId([1; 16]), site: [2; SEALED_KEY_LEN], recovery };
        let file = KeysFile {
            stream: StreamId([9; 16]),
            site_key: [1; 16],
            recovery_key: [0; 16],
            retention_s: 14_400,
            name: "shop".into(),
            keys: vec![key(None), key(Some([3; SEALED_KEY_LEN]))],
            disks: vec![(disk.clone(), 1), (disk, 2)],
        };
        let whole = file.encode();
        assert_eq!(KeysFile::decode(&whole), Ok(file));
        for length in 0..whole.len() {
            let mut cut = whole[..length].to_vec();
            if length >= 16 {
                // Damaged before its length and sum were taken.
                crate::close_table(&mut cut);
            }
            assert!(KeysFile::decode(&cut).is_err(), "{length} of {} bytes", whole.len());
        }
    }
}
