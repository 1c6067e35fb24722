"""The text of the NBD protocol, sentence by sentence, by raw bytes: what libraries never send, or hide from a test.

Each case gets an address (a path, or host and port), the name of a writable export, and its size.
"""

import itertools
import random
import socket
import struct
import threading
import time

from cluster import MIB, expect

OPTION = 0x49484156454F5054
OPTION_REPLY = 0x3E889045565A9
REQUEST, SIMPLE, CHUNK = 0x25609513, 0x67446698, 0x668E33EF
EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = range(1, 12)
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG = (
    (1 << 31) + n for n in range(1, 10))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST = (1 << n for n in range(5))
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 22, 28, 75, 95
ERROR_CHUNKS = (0x8001, 0x8002)


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack(">I", len(value)) + value


def go(name, *infos):
    return text(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta(name, *queries):
    return text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))


class Client:
    """A client that sends what it likes and believes nothing."""

    def __init__(self, address, flags=3, timeout=20):
        kind = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
        self.socket = socket.socket(kind)
        self.socket.settimeout(timeout)
        self.socket.connect(address)
        self.structured = False
        magic, option, server = struct.unpack(">8sQH", self.take(18))
        expect((magic, option) == (b"NBDMAGIC", OPTION), "another greeting")
        expect(server & 1 and not server & ~3, f"handshake flags {server:x}")
        if flags is not None:
            self.send(struct.pack(">I", flags))

    def send(self, data):
        self.socket.sendall(data)

    def take(self, count):
        out = bytearray()
        while len(out) < count:
            part = self.socket.recv(min(count - len(out), MIB))
            if not part:
                raise EOFError(f"closed after {len(out)} of {count} bytes")
            out += part
        return bytes(out)

    def option(self, number, data=b"", length=None):
        """Sends an option; its replies up to the last one, as (kind, data)."""
        self.send(struct.pack(">QII", OPTION, number, len(data) if length is None else length) + data)
        return self.replies(number)

    def replies(self, number):
        found = []
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self.take(20))
            expect(magic == OPTION_REPLY and option == number, f"a reply to {option} instead of {number}")
            found.append((kind, self.take(length)))
            if kind == ACK or kind & 1 << 31:
                expect(kind != ACK or length == 0, "an ACK with data")
                return found

    def last(self, number, data=b""):
        return self.option(number, data)[-1][0]

    def enter(self, name, structured=False, contexts=False, infos=()):
        if structured:
            expect(self.last(STRUCTURED) == ACK, "no structured replies")
            self.structured = True
        if contexts:
            found = self.option(SET_META, meta(name, "base:allocation"))
            expect([k for k, _ in found] == [META, ACK], f"contexts {found}")
            self.context = struct.unpack(">I", found[0][1][:4])[0]
        found = self.option(GO, go(name, *infos))
        expect(found[-1][0] == ACK, f"GO: {found}")
        self.abilities = next(struct.unpack(">HQH", d) for k, d in found if k == REP_INFO and d[:2] == b"\0\0")[2]
        return self

    def request(self, kind, offset=0, length=0, data=b"", flags=0, cookie=77, magic=REQUEST):
        self.send(struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length) + data)

    def message(self, data_of=None):
        """The next message: cookie, error (or none while chunks follow), chunks as (type, payload)."""
        magic, = struct.unpack(">I", self.take(4))
        if magic == SIMPLE:
            error, cookie = struct.unpack(">IQ", self.take(12))
            data = self.take(data_of(cookie)) if data_of and not error else b""
            return cookie, error, data
        expect(magic == CHUNK, f"a message that begins with {magic:x}")
        expect(self.structured, "a structured reply that was not negotiated")
        flags, kind, cookie, length = struct.unpack(">HHQI", self.take(16))
        payload = self.take(length)
        expect(not flags & ~1, f"chunk flags {flags:x}")
        if kind in ERROR_CHUNKS:
            error, said = struct.unpack(">IH", payload[:6])
            expect(error and said <= min(4096, length - 6), "a senseless error chunk")
        return cookie, flags, (kind, payload)

    def answer(self, kind, offset=0, length=0, data=b"", flags=0, cookie=77):
        """One request and all of its reply: error and data (of reads) or extents (of block status)."""
        self.request(kind, offset, length, data, flags, cookie)
        out, covered, extents, content = bytearray(length if kind == READ else 0), 0, None, 0
        error = 0
        while True:
            wanted = (lambda _: length) if kind == READ else None
            got, second, rest = self.message(wanted)
            expect(got == cookie, f"cookie {got:x} instead of {cookie:x}")
            if isinstance(rest, bytes):
                expect(not (self.structured and kind in (READ, STATUS) and (kind == READ or not second)),
                       "a simple reply where a structured one must be")
                return second, rest
            chunk, payload = rest
            if chunk in ERROR_CHUNKS:
                error = error or struct.unpack(">I", payload[:4])[0]
            elif chunk in (1, 2):
                expect(kind == READ, "data that nobody asked for")
                at, = struct.unpack(">Q", payload[:8])
                size = len(payload) - 8 if chunk == 1 else struct.unpack(">I", payload[8:])[0]
                expect(size > 0 and offset <= at and at + size <= offset + length, "a chunk outside the request")
                if chunk == 1:
                    out[at - offset:at - offset + size] = payload[8:]
                covered += size
                content += 1
            elif chunk == 5:
                expect(kind == STATUS and struct.unpack(">I", payload[:4])[0] == self.context, "another context")
                extents = list(struct.iter_unpack(">II", payload[4:]))
            else:
                expect(chunk == 0 and not payload, f"a chunk of type {chunk}")
            if second & 1:
                break
        if error == 0 and kind == READ:
            expect(covered == length, f"{covered} of {length} bytes")
            expect(not flags & DF or content == 1, f"{content} chunks although none was to be cut")
        return error, extents if kind == STATUS else bytes(out)

    def closed(self):
        """The rest of what the server says, until it ends the connection."""
        out = b""
        try:
            while part := self.socket.recv(65536):
                out += part
        except ConnectionError:
            pass
        return out

    def close(self):
        self.socket.close()


def client_flags(address, name, size):
    """Flags that were not offered end the connection; without FIXED_NEWSTYLE options are served all the same."""
    for flags in (4, 0x10000, 1 << 31, 0xFFFFFFFF):
        expect(Client(address, flags).closed() == b"", f"flags {flags:x} get an answer")
    for flags in (0, 1, 2, 3):
        client = Client(address, flags)
        expect(client.last(LIST) == ACK, f"LIST with flags {flags}")
        client.close()


def unsupported_options(address, name, size):
    """Whatever is not known is UNSUP, its data is skipped, and what follows is understood. TLS is not to be had."""
    client = Client(address)
    for number, data in ((STARTTLS, b""), (PEEK, b"x"), (EXTENDED, b""), (0, b""), (12, b"?" * 70_000),
                         (0x7654321, b"1234"), (0xFFFFFFFF, b"x" * MIB), (STARTTLS, b"no data allowed")):
        kind = client.last(number, data)
        expect(kind in (UNSUP, POLICY, PLATFORM) or (data and kind == INVALID), f"option {number}: {kind:x}")
    expect(client.last(LIST) == ACK, "the connection does not go on")
    client.enter(name)
    expect(client.answer(READ, 0, 512)[0] == 0, "a read fails")


def options_one_after_another(address, name, size):
    """A client that does not wait for replies gets all of them, in order."""
    client = Client(address)
    numbers = [LIST, STRUCTURED, INFO, LIST, 999, LIST_META, STARTTLS, LIST] * 20
    data = {INFO: go(name), LIST_META: meta(name), 999: b"x" * 5000}
    client.send(b"".join(struct.pack(">QII", OPTION, n, len(data.get(n, b""))) + data.get(n, b"") for n in numbers))
    for number in numbers:
        client.replies(number)
    client.structured = True
    client.enter(name)
    expect(client.answer(READ, 0, 512)[0] == 0, "a read fails")


def options_byte_by_byte(address, name, size):
    """Nothing depends on how bytes are cut into packets."""
    client = Client(address, None)
    whole = struct.pack(">I", 3) + struct.pack(">QII", OPTION, LIST, 0)
    whole += struct.pack(">QII", OPTION, GO, len(go(name, 3))) + go(name, 3)
    whole += struct.pack(">IHHQQI", REQUEST, 0, READ, 7, 0, 512)
    for byte in whole:
        client.send(bytes([byte]))
    client.replies(LIST)
    expect(client.replies(GO)[-1][0] == ACK, "GO")
    expect(client.message(lambda _: 512)[:2] == (7, 0), "a read fails")


def malformed_options(address, name, size):
    """Lengths that do not fit are INVALID, and the next option is read where it begins."""
    client = Client(address)
    good = go(name, 0, 3)
    for number in (INFO, GO):
        for data in (b"", b"\0", b"\0" * 5, good[:-1], good + b"\0", text("x" * 10)[:-1], struct.pack(">I", 0xFFFFFFFF),
                     struct.pack(">I", len(name) + 6) + good[4:], text(name) + struct.pack(">H", 65535)):
            expect(client.last(number, data) == INVALID, f"{number}: {data!r}")
    for data in (b"x", b"x" * 20_000):
        expect(client.last(LIST, data) == INVALID, "a LIST with data")
        expect(client.last(STRUCTURED, data) == INVALID, "STRUCTURED_REPLY with data")
    expect(client.last(SET_META, meta(name, "base:allocation")) == INVALID, "SET_META_CONTEXT before structured replies")
    expect(client.last(STRUCTURED) == ACK, "structured replies")
    good = meta(name, "base:allocation")
    for number in (LIST_META, SET_META):
        for data in (b"", good[:-1], good + b"x", good[:3], text(name), text(name) + b"\0\0",
                     text(name) + struct.pack(">I", 0xFFFFFFFF), text(name) + struct.pack(">II", 1, 0xFFFFFFF0)):
            expect(client.last(number, data) == INVALID, f"{number}: {data!r}")
    for number, data in ((INFO, go("x" * 4097)), (GO, go("x" * 20_000)), (SET_META, meta("x" * 5000))):
        expect(client.last(number, data) in (TOO_BIG, INVALID, UNKNOWN), "a name that is too long")
    for strange in (b"\xff\xfe\xfd", b"a\0b", name.encode() + b"\0", b"\n", b"x" * 4096, name.upper().encode() + b"?"):
        expect(client.last(INFO, go(strange)) == UNKNOWN, f"the name {strange!r}")
    client.structured = True
    client.enter(name)
    expect(client.answer(READ, 0, 512)[0] == 0, "a read fails")


def information(address, name, size):
    """INFO and GO say the same, answer what is asked once, and ignore what they do not know."""
    client = Client(address)
    for infos in ((), (0,), (3,), (1, 2, 3), (0xFFFF, 77, 3), (3, 3, 3, 0, 0)):
        found = client.option(INFO, go(name, *infos))
        expect(found[-1][0] == ACK and all(k == REP_INFO for k, _ in found[:-1]), f"{found}")
        kinds = [struct.unpack(">H", d[:2])[0] for _, d in found[:-1]]
        expect(kinds.count(0) == 1 and len(set(kinds)) == len(kinds), f"kinds {kinds} for {infos}")
        for _, data in found[:-1]:
            if data[:2] == b"\0\0":
                expect(len(data) == 12 and struct.unpack(">Q", data[2:10])[0] == size, "the size")
                abilities, = struct.unpack(">H", data[10:])
                expect(abilities & 1 and not abilities & 1 << 7, f"abilities {abilities:x} without structured replies")
            elif data[:2] == b"\0\1":
                expect(data[2:].decode() == name, "the name")
            elif data[:2] == b"\0\3":
                expect(len(data) == 14, "the sizes")
                small, best, most = struct.unpack(">III", data[2:])
                expect(small & small - 1 == 0 and 1 <= small <= 65536, f"smallest {small}")
                expect(best & best - 1 == 0 and best >= max(small, 512) and most >= max(best, MIB), f"{best}, {most}")
                expect(size % small == 0, "the size is no multiple of the smallest block")
        expect(3 not in infos or 3 in kinds, "no sizes")
    expect(client.last(GO, go("no such export")) == UNKNOWN, "GO to nothing")
    before = client.option(INFO, go(name, 3, 1))
    expect(sorted(before) == sorted(client.option(GO, go(name, 3, 1))), "GO says other things than INFO")
    expect(client.answer(READ, 0, 512)[0] == 0, "a read fails")


def contexts(address, name, size):
    """Queries, wildcards, unknown namespaces, and which selection counts."""
    client = Client(address)
    client.last(STRUCTURED)
    client.structured = True
    allocation = b"base:allocation"
    for number, queries, wanted in (
            (LIST_META, (), True), (LIST_META, ("base:",), True), (LIST_META, ("base:allocation",), True),
            (LIST_META, ("qemu:", "x-none:y"), False), (LIST_META, ("base:alloc",), False), (LIST_META, ("",), False),
            (SET_META, (), False), (SET_META, ("base:",), False), (SET_META, ("base:allocatio",), False),
            (SET_META, ("qemu:dirty-bitmap:x", "base:allocation", "base:allocation"), True)):
        found = client.option(number, meta(name, *queries))
        names = [d[4:] for k, d in found[:-1]]
        ends = (ACK, INVALID) if queries and not wanted else (ACK,)
        expect(found[-1][0] in ends and names == ([allocation] if wanted else []), f"{number} {queries}: {found}")
    expect(client.last(SET_META, meta("no such export", "base:allocation")) == UNKNOWN, "contexts of nothing")
    client.enter(name)
    expect(client.answer(STATUS, 0, 4096)[0] == EINVAL, "the failed selection did not replace the one before")
    client = Client(address)
    client.enter(name)
    expect(client.answer(STATUS, 0, 4096)[0] == EINVAL, "block status without structured replies")


def export_name(address, name, size):
    """The old way in, after options, with and without padding; requests may follow at once."""
    for flags, structured in itertools.product((0, 1, 2, 3), (False, True)):
        client = Client(address, flags)
        if structured:
            client.last(STRUCTURED)
            client.structured = True
        client.send(struct.pack(">QII", OPTION, EXPORT_NAME, len(name)) + name.encode())
        client.request(READ, 0, 512, cookie=5)
        got, abilities = struct.unpack(">QH", client.take(10))
        expect(got == size and abilities & 1 and bool(abilities & 1 << 7) == structured, f"{got}, {abilities:x}")
        expect(client.take(0 if flags & 2 else 124).count(0) == (0 if flags & 2 else 124), "padding")
        cookie = client.message(lambda _: 512)[0]
        expect(cookie == 5, "the request that followed at once")
        client.close()
    for wrong in (b"none", b"x" * 4096, b"x" * 4097, name.encode() + b"\0"):
        client = Client(address)
        client.send(struct.pack(">QII", OPTION, EXPORT_NAME, len(wrong)) + wrong)
        expect(client.closed() == b"", "something is said before the end")


def aborts(address, name, size):
    """ABORT is acknowledged, with data or without, and then the connection ends in order."""
    for data in (b"", b"bye", b"x" * 10_000, b"x" * 5 * MIB):
        client = Client(address)
        expect(client.option(ABORT, data) == [(ACK, b"")], "ABORT")
        expect(client.closed() == b"", "more than an ACK")
    # A client that says all it has to say at once, and then listens.
    client = Client(address)
    client.send(struct.pack(">QII", OPTION, LIST, 0) * 100 + struct.pack(">QII", OPTION, INFO, len(go(name))) + go(name))
    client.socket.shutdown(socket.SHUT_WR)
    for _ in range(100):
        client.replies(LIST)
    expect(client.replies(INFO)[-1][0] == ACK, "INFO from a client that only listens")
    expect(client.closed() == b"", "more than the answers")
    client = Client(address)
    client.send(struct.pack(">QII", OPTION, ABORT, 0))
    client.close()


def every_flag_of_every_command(address, name, size):
    """Documented flags work where they are documented; every other one is EINVAL, and FUA is taken everywhere."""
    documented = {READ: DF, WRITE: 0, FLUSH: 0, TRIM: 0, CACHE: 0, ZEROES: NO_HOLE | FAST, STATUS: REQ_ONE}
    for structured in (False, True):
        client = Client(address).enter(name, structured, structured)
        for kind in (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS):
            length = 0 if kind == FLUSH else 4096
            data = b"\x5c" * 4096 if kind == WRITE else b""
            if kind == STATUS and not structured:
                continue
            for bit in range(16):
                error, _ = client.answer(kind, 0, length, data, 1 << bit)
                if 1 << bit == FUA or documented[kind] & 1 << bit and (structured or 1 << bit != DF):
                    allowed = (0, ENOTSUP) if 1 << bit == FAST else (0,)
                else:
                    allowed = (EINVAL,)
                expect(error in allowed, f"command {kind} with flag {bit}, structured {structured}: {error}")
        for kind in (8, 9, 100, 0x5555, 0xFFFF):
            expect(client.answer(kind, 0, 512)[0] == EINVAL, f"command {kind}")
            expect(client.answer(kind, 1 << 63, 0xFFFFFFFF, flags=0xFFFF)[0] == EINVAL, f"command {kind}, far away")
        expect(client.answer(READ, 0, 512)[0] == 0, "the connection does not go on")


def ranges(address, name, size):
    """What is not on the disk is refused with the error of its command; nothing is written."""
    wanted = {READ: EINVAL, WRITE: ENOSPC, TRIM: EINVAL, CACHE: EINVAL, ZEROES: ENOSPC, STATUS: EINVAL}
    for structured in (False, True):
        client = Client(address).enter(name, structured, structured)
        expect(client.answer(WRITE, size - 512, 512, b"\x77" * 512)[0] == 0, "the last block")
        for kind, error in wanted.items():
            if kind == STATUS and not structured:
                continue
            for at, length in ((size, 1), (size - 511, 512), (size - 1, 2), (1 << 62, 512), ((1 << 64) - 1, 1),
                               ((1 << 64) - 512, 512), ((1 << 64) - 256, 512)):
                found = client.answer(kind, at, length, b"\x78" * length if kind == WRITE else b"")[0]
                expect(found == error, f"command {kind} at {at}+{length}: {found}")
            if kind == READ:
                client.request(kind, size - 512, 0xFFFFFFFF)
                _, error_or_flags, rest = client.message(lambda _: 0)
                found = struct.unpack(">I", rest[1][:4])[0] if structured else error_or_flags
                expect(found == EINVAL, f"a read of 4 GiB past the end: {found}")
            if kind not in (READ, WRITE):
                expect(client.answer(kind, 512, 0xFFFFFFFF)[0] in (error, EOVERFLOW), f"command {kind}, 4 GiB")
        for kind in (READ, WRITE, TRIM, CACHE, ZEROES, STATUS):
            if kind != STATUS or structured:
                client.answer(kind, 0, 0)  # unspecified, but not the end
        expect(client.answer(READ, size - 512, 512) == (0, b"\x77" * 512), "something was written")


def sizes_of_requests(address, name, size):
    """Up to the largest payload, whatever its alignment; beyond it an error, and the connection goes on."""
    rng = random.Random(11)
    for structured in (False, True):
        client = Client(address).enter(name, structured)
        for length in (1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 524287, 524288, 524289, 1 << 20,
                       (4 << 20) + 1, (32 << 20) - 1, 32 << 20):
            at = rng.randrange(0, size - length + 1)
            data = rng.randbytes(length)
            expect(client.answer(WRITE, at, length, data)[0] == 0, f"a write of {length} at {at}")
            expect(client.answer(READ, at, length) == (0, data), f"a read of {length} at {at}")
            if structured and length <= 65536:
                expect(client.answer(READ, at, length, flags=DF) == (0, data), f"an uncut read of {length} at {at}")
        if structured:
            error, data = client.answer(READ, 0, 32 << 20, flags=DF)
            expect(error in (0, EOVERFLOW), f"an uncut read of 32 MiB: {error}")
    client = Client(address).enter(name, infos=(3,))
    error, _ = client.answer(READ, 0, (32 << 20) + 1)
    expect(error in (0, EINVAL), f"a read that is too long: {error}")
    error, _ = Client(address).enter(name, True, infos=(3,)).answer(READ, 0, (32 << 20) + 1)
    expect(error in (0, EOVERFLOW), f"a structured read that is too long: {error}")
    error, _ = client.answer(WRITE, 0, (32 << 20) + 1, bytes((32 << 20) + 1))
    expect(error in (0, EINVAL), f"a write that is too long: {error}")
    expect(client.answer(READ, 0, 512)[0] == 0, "the connection does not go on")


def whole_disk_at_once(address, name, size):
    """Commands without payload take the whole disk."""
    client = Client(address).enter(name, True, True)
    expect(client.answer(WRITE, 12345, 70_000, b"\x31" * 70_000)[0] == 0, "a write")
    for kind, flags in ((CACHE, 0), (ZEROES, NO_HOLE), (TRIM, FUA), (ZEROES, FUA)):
        expect(client.answer(kind, 0, size, flags=flags)[0] == 0, f"command {kind} on the whole disk")
    expect(client.answer(READ, 10_000, 80_000) == (0, bytes(80_000)), "what was there is still there")


def block_status(address, name, size):
    """Extents follow each other from the offset on, have a length, and never call data a hole."""
    client = Client(address).enter(name, True, True)
    client.answer(ZEROES, 0, size)
    expect(client.answer(WRITE, 5 * MIB + 7, 3 * MIB, b"\x41" * (3 * MIB))[0] == 0, "a write")
    for at, length, flags in ((0, size, 0), (1, 1, 0), (5 * MIB, 4 * MIB, 0), (513, size - 513, 0), (size - 1, 1, 0),
                              (0, size, REQ_ONE), (5 * MIB + 7, 512, REQ_ONE), (6 * MIB, 3 * MIB, REQ_ONE)):
        error, extents = client.answer(STATUS, at, length, flags=flags)
        expect(error == 0 and extents and all(n > 0 for n, _ in extents), f"{at}+{length}: {error}, {extents}")
        expect(sum(n for n, _ in extents[:-1]) < length, "more extents than were asked for")
        if flags:
            expect(len(extents) == 1 and extents[0][0] <= length, f"one extent was asked for: {extents}")
        place = at
        for count, state in extents:
            expect(state & ~3 == 0, f"state {state:x}")
            overlap = place < 8 * MIB + 7 and 5 * MIB + 7 < place + count
            expect(not overlap or state == 0, f"data at {place}+{count} has state {state}")
            place += count


def cookies(address, name, size):
    """A cookie is opaque, and may even be used twice."""
    client = Client(address).enter(name)
    for cookie in (0, 1, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1, REQUEST, SIMPLE << 32 | CHUNK):
        expect(client.answer(FLUSH, cookie=cookie)[0] == 0, f"cookie {cookie:x}")
    for _ in range(50):
        client.request(READ, 0, 512, cookie=9)
    for _ in range(50):
        expect(client.message(lambda _: 512)[:2] == (9, 0), "a cookie used many times")


def pipeline(address, name, size):
    """Hundreds of requests of all kinds in one piece: each is answered once."""
    rng = random.Random(3)
    for structured in (False, True):
        client = Client(address).enter(name, structured, structured)
        kinds, pieces = {}, []
        for cookie in range(1500):
            kind = rng.choice([READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, 99] + [STATUS] * structured)
            length = 0 if kind == FLUSH else rng.choice([1, 512, 4096, 5000, 70_000])
            at = 0 if kind == FLUSH else rng.randrange(0, size - length)
            pieces.append(struct.pack(">IHHQQI", REQUEST, 0, kind, cookie, at, length))
            pieces.append(b"\x66" * length if kind == WRITE else b"")
            kinds[cookie] = (kind, length)
        sender = threading.Thread(target=client.send, args=(b"".join(pieces),))
        sender.start()
        while kinds:
            cookie, second, rest = client.message(lambda c: kinds[c][1] if kinds[c][0] == READ else 0)
            expect(cookie in kinds, f"an answer too many for {cookie}")
            if isinstance(rest, bytes):
                kind, _ = kinds.pop(cookie)
                expect(second == (EINVAL if kind == 99 else 0), f"command {kind}: {second}")
            elif second & 1:
                kind, _ = kinds.pop(cookie)
                expect((rest[0] in ERROR_CHUNKS) == (kind == 99), f"command {kind}: chunk {rest[0]:x}")
        sender.join()


def disconnects(address, name, size):
    """DISC answers what is under way, then ends; whatever else it says does not matter. A half-closed socket too."""
    for flags, at, length in ((0, 0, 0), (0xFFFF, 1 << 60, 0xFFFFFFFF)):
        client = Client(address).enter(name)
        for cookie in range(100):
            client.request(WRITE, cookie * 8192, 8192, bytes([cookie + 1]) * 8192, cookie=cookie)
        client.request(DISC, at, length, flags=flags)
        seen = {client.message()[:2] for _ in range(100)}
        expect(seen == {(cookie, 0) for cookie in range(100)}, "not all writes were answered")
        expect(client.closed() == b"", "DISC has an answer")
    client = Client(address).enter(name)
    for cookie in range(100):
        client.request(READ, cookie * 8192, 8192, cookie=cookie)
    client.socket.shutdown(socket.SHUT_WR)
    for _ in range(100):
        cookie, error, data = client.message(lambda _: 8192)
        expect(error == 0 and data == bytes([cookie + 1]) * 8192, f"the read {cookie}")
    expect(client.closed() == b"", "more than the answers")


def wrong_magic(address, name, size):
    """Requests of other or older protocols end the connection and touch nothing."""
    for magic in (0x12560953, 0x25609514, 0x21E41C71, 0, 0xFFFFFFFF):
        client = Client(address).enter(name)
        client.request(WRITE, 0, 512, b"\x13" * 512, magic=magic)
        expect(client.closed() == b"", f"magic {magic:x} is answered")
    expect(Client(address).enter(name).answer(READ, 0, 512)[1] != b"\x13" * 512, "it was written")


def cut_anywhere(address, name, size):
    """A connection that ends within any byte of a write changes nothing."""
    keeper = Client(address).enter(name)
    expect(keeper.answer(WRITE, 0, 8192, b"\x61" * 8192)[0] == 0, "a write")
    whole = struct.pack(">IHHQQI", REQUEST, 0, WRITE, 1, 0, 8192) + b"\x62" * 8192
    for sent in [*range(1, 40), 4096, 8192 + 27]:
        client = Client(address).enter(name)
        client.send(whole[:sent])
        if sent % 2:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    expect(keeper.answer(READ, 0, 8192) == (0, b"\x61" * 8192), "half a write reached the disk")


def deaf_and_flooding(address, name, size):
    """Clients that ask for everything and take nothing, or never finish a sentence, hold nobody up."""
    crowd = []
    for number in range(12):
        client = Client(address, timeout=0.5).enter(name, number % 2 == 0)
        try:
            for cookie in range(3000):
                client.request(READ, (cookie % 8) * MIB, MIB, cookie=cookie)
        except OSError:
            pass
        crowd.append(client)
    for number in range(12):
        client = Client(address).enter(name)
        client.send(struct.pack(">IHHQQI", REQUEST, 0, WRITE, 1, 0, 16 * MIB) + b"\x01" * (number * 100_000))
        crowd.append(client)
    slowest = 0
    client = Client(address).enter(name)
    for turn in range(100):
        begun = time.monotonic()
        data = bytes([turn]) * 4096
        expect(client.answer(WRITE, 40 * MIB, 4096, data)[0] == 0, "a write")
        expect(client.answer(READ, 40 * MIB, 4096) == (0, data), "a read")
        slowest = max(slowest, time.monotonic() - begun)
    expect(slowest < 2, f"another client waited {slowest:.1f} s")
    for one in crowd:
        one.close()


def noise(address, name, size):
    """Whatever comes, in either phase, others are served."""
    rng = random.Random(23)
    keeper = Client(address).enter(name)
    expect(keeper.answer(WRITE, 0, 65536, b"\x91" * 65536)[0] == 0, "a write")
    for turn in range(150):
        client = Client(address, timeout=5)
        try:
            if turn % 2:
                # Reads and other harmless commands with spoilt fields, at places where nothing is written.
                client.enter(name, turn % 4 == 1, turn % 4 == 1)
                for _ in range(rng.randrange(1, 30)):
                    head = bytearray(struct.pack(">IHHQQI", REQUEST, rng.choice([0, 0, rng.randrange(65536)]),
                                                 rng.choice([READ, FLUSH, CACHE, STATUS, rng.randrange(8, 65536)]),
                                                 rng.getrandbits(64), rng.getrandbits(rng.randrange(1, 65)),
                                                 rng.getrandbits(rng.randrange(1, 33))))
                    if rng.randrange(20) == 0:
                        head[rng.randrange(4)] ^= 1 << rng.randrange(8)
                    client.send(bytes(head))
            else:
                for _ in range(rng.randrange(1, 10)):
                    data = rng.randbytes(rng.randrange(0, 300))
                    length = rng.choice([len(data), len(data), rng.randrange(0, 1000), rng.getrandbits(32)])
                    magic = OPTION if rng.randrange(10) else rng.getrandbits(64)
                    client.send(struct.pack(">QII", magic, rng.randrange(0, 13), length) + data)
            client.socket.shutdown(socket.SHUT_WR)
            client.closed()
        except OSError:
            pass
        client.close()
    expect(keeper.answer(READ, 0, 65536) == (0, b"\x91" * 65536), "another client's data changed")


def durable_for_all(address, name, size):
    """What one connection wrote, another reads after the answer, and flushes."""
    first, second = Client(address).enter(name), Client(address).enter(name, True)
    expect(first.abilities & 1 << 8, "several connections are not offered")
    for turn in range(100):
        data = bytes([turn + 1]) * 6000
        expect(first.answer(WRITE, turn * 6000, 6000, data, FUA if turn % 3 == 0 else 0)[0] == 0, "a write")
        expect(second.answer(READ, turn * 6000, 6000) == (0, data), "the other does not see it")
        expect(second.answer(FLUSH)[0] == 0, "a flush")
        first, second = second, first


CASES = {
    "client flags": client_flags,
    "unsupported options": unsupported_options,
    "options without waiting": options_one_after_another,
    "byte by byte": options_byte_by_byte,
    "malformed options": malformed_options,
    "INFO and GO": information,
    "metadata contexts": contexts,
    "EXPORT_NAME": export_name,
    "ABORT": aborts,
    "every flag of every command": every_flag_of_every_command,
    "ranges": ranges,
    "sizes of requests": sizes_of_requests,
    "the whole disk at once": whole_disk_at_once,
    "extents": block_status,
    "cookies": cookies,
    "a pipeline": pipeline,
    "DISC": disconnects,
    "wrong magic": wrong_magic,
    "connections cut anywhere": cut_anywhere,
    "deaf and flooding clients": deaf_and_flooding,
    "noise": noise,
    "several connections": durable_for_all,
}
