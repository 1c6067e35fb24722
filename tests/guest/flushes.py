"""Every flush of a host is a restore point: what the kernel's own log of writes (dm-log-writes) says that a device held at
each flush is what the journal, played to one of its records, holds."""

import hashlib
import struct

import formats
import journal_reader
from cluster import MIB, expect

SECTOR = 512
MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


class State:
    """The content of a disk as one number that each write changes: sectors of zeros do not count."""

    def __init__(self):
        self.sectors = {}
        self.value = 0

    def _part(self, sector, content):
        return int.from_bytes(hashlib.blake2b(sector.to_bytes(8, "little") + content, digest_size=16).digest(), "little")

    def write(self, sector, data):
        for at in range(0, len(data), SECTOR):
            content = bytes(data[at:at + SECTOR])
            old = self.sectors.pop(sector, None)
            if old is not None:
                self.value ^= self._part(sector, old)
            if any(content):
                self.sectors[sector] = content
                self.value ^= self._part(sector, content)
            sector += 1

    def zero(self, sector, count):
        self.write(sector, bytes(count * SECTOR))


def kernel_log(path):
    """The entries of a log of dm-log-writes: (sector, count, flags, data)."""
    with open(path, "rb") as log:
        magic, version, entries, size = struct.unpack("<QQQI", log.read(28))
        expect(magic == MAGIC and version == 1, f"not a log of writes: {magic:#x}")
        log.seek(size)
        for _ in range(entries):
            head = log.read(size)
            sector, count, flags, length = struct.unpack_from("<QQQQ", head)
            data = b"" if flags & DISCARD else log.read(length if flags & MARK else count * size)
            if flags & MARK:
                log.seek(-length % size, 1)
            unit = size // SECTOR
            yield sector * unit, count * unit, flags, data


def compare(log, folder):
    """Numbers of flushes, of writes and of records, once each flush has been found among the records, in order."""
    points, state = {}, State()
    points[state.value] = [0]
    stream = next((folder / "journal" / "streams").iterdir())
    keys = journal_reader.state_keys(folder / "target-state")
    [line] = [found for found in formats.segments(stream, keys).values()]
    records = [r for _, frames in line for _, _, found in frames for r in found]
    for number, record in enumerate(records, 1):
        sector, length = record["offset"] // SECTOR, record["length"]
        if record["kind"] in formats.WRITES:
            state.write(sector, record["body"])
        elif record["kind"] in formats.ZEROS:
            state.zero(sector, length // SECTOR)
        else:
            continue
        points.setdefault(state.value, []).append(number)

    held, at = State(), 0
    flushes = writes = 0
    for sector, count, flags, data in kernel_log(log):
        if flags & FLUSH:
            # What was written before this is what the flush was for.
            later = [n for n in points.get(held.value, []) if n >= at]
            expect(later, f"what the device held at flush {flushes}, after {writes} writes, is at no record behind {at}")
            at = later[0]
            flushes += 1
        if flags & DISCARD:
            held.zero(sector, count)
            writes += 1
        elif data:
            held.write(sector, data)
            writes += 1
    expect(held.value == state.value, "the journal's end is not what the kernel wrote last")
    return flushes, writes, len(records)


def script(target, log, least=SECTOR):
    """One write at a time, so that a flush has no other under way: of many sizes and places, zeros, and discards."""
    fio = "fio --name=w --filename=/dev/mapper/logged --ioengine=psync --direct=1 --bsrange={least}-16k " \
          "--norandommap --randrepeat=0 --refill_buffers --fsync=5 --output-format=terse".replace("{least}", str(least))
    return f"""
size=$(blockdev --getsz {target})
echo "0 $size log-writes {target} {log}" | dmsetup create logged --noudevsync --noudevrules
dmsetup mknodes logged
{fio} --rw=randwrite --size=16M --io_size=3M
blkdiscard -o {MIB} -l {MIB} /dev/mapper/logged
{fio} --rw=randwrite --size=16M --io_size=1M --zero_buffers
fallocate -z -n -o {3 * MIB} -l {MIB} /dev/mapper/logged
sync /dev/mapper/logged
{fio} --rw=randwrite --size=16M --io_size=3M
sync /dev/mapper/logged
dmsetup remove --noudevsync logged
"""
