"""Corners of the NBD protocol: by libnbd, and by bytes that no library would send."""

import errno
import random
import socket
import struct
import time

import nbd

from cluster import MIB, Failed, expect

OPTION = 0x49484156454F5054
OPTION_REPLY = 0x3E889045565A9
REQUEST = 0x25609513
SIMPLE = 0x67446698


def opened(uri, change=None):
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    if change:
        change(handle)
    handle.connect_uri(uri)
    return handle


def refuses(what, function, *codes):
    """The call fails with one of these errors (any, if none is given)."""
    try:
        function()
    except nbd.Error as error:
        expect(not codes or error.errnum in codes, f"{what}: {error}")
        return
    raise Failed(f"{what} succeeds")


def structured_reads(uri, size):
    handle = opened(uri)
    expect(handle.get_structured_replies_negotiated(), "not negotiated")
    handle.pwrite(b"\x5a" * 70_000, 3 * MIB + 17)
    seen = bytearray(70_000)

    def chunk(data, offset, status, error):
        expect(status in (nbd.READ_DATA, nbd.READ_HOLE), f"chunk of kind {status}, error {error.value}")
        if status == nbd.READ_DATA:
            at = offset - (3 * MIB + 17)
            seen[at:at + len(data)] = data
    handle.pread_structured(70_000, 3 * MIB + 17, chunk)
    expect(bytes(seen) == b"\x5a" * 70_000, "the chunks do not make up the data")
    count = 0

    def whole(data, offset, status, error):
        nonlocal count
        count += 1
    handle.pread_structured(65_536, 3 * MIB, whole, nbd.CMD_FLAG_DF)
    expect(count == 1, f"{count} chunks although none was to be cut")
    handle.shutdown()


def simple_replies(uri, size):
    handle = opened(uri, lambda h: h.set_request_structured_replies(False))
    expect(not handle.get_structured_replies_negotiated(), "negotiated although not asked for")
    handle.pwrite(b"simple" * 1000, 12_345)
    expect(handle.pread(6000, 12_345) == b"simple" * 1000, "reads something else")
    handle.shutdown()


def block_status(uri, size):
    handle = opened(uri)
    handle.pwrite(b"\x11" * MIB, 16 * MIB, nbd.CMD_FLAG_FUA)
    handle.trim(4 * MIB, 20 * MIB, nbd.CMD_FLAG_FUA)
    extents = []

    def extent(context, offset, entries, error):
        extents.extend(zip(entries[0::2], entries[1::2]))
    handle.block_status(8 * MIB, 16 * MIB, extent)
    expect(extents and all(length > 0 for length, _ in extents), f"extents {extents}")
    expect(extents[0][1] & nbd.STATE_HOLE == 0 and extents[0][1] & nbd.STATE_ZERO == 0, "data is called a hole")
    one = []
    handle.block_status(8 * MIB, 16 * MIB, lambda c, o, e, err: one.extend(e), nbd.CMD_FLAG_REQ_ONE)
    expect(len(one) == 2 and one[0] <= 8 * MIB, f"one extent was asked for: {one}")
    handle.shutdown()


def fua_everywhere(uri, size):
    handle = opened(uri)
    handle.pwrite(b"\x21" * 4096, 0, nbd.CMD_FLAG_FUA)
    handle.zero(4096, 4096, nbd.CMD_FLAG_FUA)
    handle.trim(4096, 8192, nbd.CMD_FLAG_FUA)
    handle.flush()
    expect(handle.pread(8192, 0) == b"\x21" * 4096 + bytes(4096), "reads something else")
    handle.shutdown()


def zeroes(uri, size):
    handle = opened(uri)
    for flags in (0, nbd.CMD_FLAG_NO_HOLE):
        handle.pwrite(b"\x31" * (2 * MIB), 30 * MIB)
        handle.zero(MIB + 1001, 30 * MIB + 333, flags)
        expect(handle.pread(2 * MIB, 30 * MIB) == b"\x31" * 333 + bytes(MIB + 1001) + b"\x31" * (MIB - 1334),
               f"zeroes with flags {flags} are not exactly where they should be")
    if handle.can_fast_zero():
        handle.pwrite(b"\x32" * MIB, 30 * MIB)
        try:
            handle.zero(MIB, 30 * MIB, nbd.CMD_FLAG_FAST_ZERO)
            expect(handle.pread(MIB, 30 * MIB) == bytes(MIB), "fast zeroes are no zeroes")
        except nbd.Error as error:
            expect(error.errnum in (errno.ENOTSUP, errno.EOPNOTSUPP), f"fast zeroes fail with {error}")
            expect(handle.pread(MIB, 30 * MIB) == b"\x32" * MIB, "refused fast zeroes changed the data")
    handle.shutdown()


def largest_requests(uri, size):
    handle = opened(uri)
    data = bytes(range(256)) * (32 * MIB // 256)
    handle.pwrite(data, 5)
    expect(handle.pread(32 * MIB, 5) == data, "32 MiB do not come back")
    handle.set_strict_mode(0)
    refuses("a read of 64 MiB", lambda: handle.pread(64 * MIB, 0), errno.EINVAL, errno.EOVERFLOW, errno.ENOMEM)
    expect(handle.pread(512, 5) == data[:512], "the connection is not usable any more")
    handle.shutdown()


def single_bytes(uri, size):
    handle = opened(uri)
    handle.pwrite(b"\x41" * 1024, size - 1024)
    for at in (size - 1, size - 512, size - 513):
        handle.pwrite(b"\x42", at)
        expect(handle.pread(1, at) == b"\x42", f"the byte at {at} does not come back")
    expect(handle.pread(1024, size - 1024).count(b"\x41") == 1021, "neighbours were touched")
    handle.shutdown()


def outside(uri, size):
    handle = opened(uri)
    handle.set_strict_mode(0)
    refuses("a read past the end", lambda: handle.pread(1024, size - 512), errno.EINVAL)
    refuses("a read far outside", lambda: handle.pread(512, 1 << 62), errno.EINVAL)
    refuses("a write past the end", lambda: handle.pwrite(bytes(1024), size - 512), errno.EINVAL, errno.ENOSPC)
    refuses("a trim past the end", lambda: handle.trim(1024, size - 512), errno.EINVAL, errno.ENOSPC)
    refuses("zeroes past the end", lambda: handle.zero(1024, size), errno.EINVAL, errno.ENOSPC)
    refuses("block status past the end", lambda: handle.block_status(1024, size, lambda *_: None), errno.EINVAL)
    refuses("an unknown flag", lambda: handle.pread(512, 0, 1 << 9), errno.EINVAL)
    expect(len(handle.pread(512, 0)) == 512, "the connection is not usable any more")
    handle.shutdown()


def several_connections(uri, size):
    handles = [opened(uri) for _ in range(4)]
    expect(all(h.can_multi_conn() for h in handles), "several connections are not offered")
    for round_ in range(50):
        writer, reader = handles[round_ % 4], handles[(round_ + 1) % 4]
        data = bytes([round_ + 1]) * 5000
        writer.pwrite(data, round_ * 4567)
        reader.flush()
        expect(reader.pread(5000, round_ * 4567) == data, "a write is not seen by another connection")
    for handle in handles:
        handle.shutdown()


def much_under_way(uri, size):
    """Hundreds of requests under way, overlapping; the last one answered wins on its bytes."""
    handle = opened(uri)
    buffers, errors = [], []

    def done(error):
        if error.value:
            errors.append(error.value)
        return 1
    for i in range(400):
        buffers.append(nbd.Buffer.from_bytearray(bytearray([i % 251 + 1]) * 8192))
        handle.aio_pwrite(buffers[-1], 50 * MIB + i * 4096, done)
        if i % 50 == 0:
            handle.aio_flush(done)
    limit = time.monotonic() + 30
    while handle.aio_in_flight():
        expect(time.monotonic() < limit, f"{handle.aio_in_flight()} requests are not answered")
        handle.poll(1000)
    expect(not errors, f"errors {errors}")
    data = handle.pread(400 * 4096, 50 * MIB)
    for i in range(400):
        page = data[i * 4096:(i + 1) * 4096]
        expect(page in (bytes([i % 251 + 1]) * 4096, bytes([(i - 1) % 251 + 1]) * 4096), f"page {i} is mixed")
    handle.shutdown()


def as_a_model_says(uri, size, steps=300):
    """Requests of any length at any byte, many of them at the end of the disk, over two connections; a small disk."""
    rng = random.Random(size)
    handles = [opened(uri), opened(uri, lambda h: h.set_request_structured_replies(False))]
    expect(handles[0].get_size() == size, f"the disk has {handles[0].get_size()} bytes")
    model = bytearray(handles[0].pread(size, 0))
    for step in range(steps):
        handle = rng.choice(handles)
        at = rng.randrange(max(0, size - 5000) if rng.random() < 0.3 else 0, size)
        length = min(size - at, rng.choice([1, 2, 511, 512, 513, 4096, 4097, 70_000, rng.randrange(1, size + 1)]))
        flags = nbd.CMD_FLAG_FUA if rng.random() < 0.1 else 0
        what = rng.choice(("write", "write", "zero", "trim", "read", "read", "status"))
        if what == "write":
            model[at:at + length] = rng.randbytes(length)
            handle.pwrite(model[at:at + length], at, flags)
        elif what == "zero":
            model[at:at + length] = bytes(length)
            handle.zero(length, at, flags | rng.choice((0, nbd.CMD_FLAG_NO_HOLE)))
        elif what == "trim":
            handle.trim(length, at, flags)
            # What was trimmed may hold anything; what lies beside it may not.
            model[at:at + length] = handle.pread(length, at)
        elif what == "status":
            extents = []
            handles[0].block_status(length, at, lambda c, o, e, err: extents.extend(zip(e[0::2], e[1::2])))
            for count, state in extents:
                expect(at + count <= size, f"step {step}: an extent past the end")
                expect(not state & nbd.STATE_ZERO or not any(model[at:at + count]), f"step {step}: data at {at} is called zeros")
                at += count
        else:
            expect(handle.pread(length, at) == model[at:at + length], f"step {step}: {length} bytes at {at} are wrong")
    expect(handles[1].pread(size, 0) == model, "the disk is another than the model")
    for handle in handles:
        handle.shutdown()


def options(uri, size):
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    name = handle.get_export_name()
    names = []
    handle.opt_list(lambda n, _: names.append(n) and 0)
    expect(name in names, f"{name} is not among {names}")
    handle.opt_info()
    expect(handle.get_size() == size, f"INFO says {handle.get_size()} bytes")
    handle.set_export_name("no such export")
    refuses("INFO of an unknown export", handle.opt_info, errno.ENOENT)
    refuses("GO to an unknown export", handle.opt_go, errno.ENOENT)
    handle.set_export_name("x" * 4096)
    refuses("INFO of the longest name", handle.opt_info)
    handle.set_export_name(name)
    contexts = []
    handle.clear_meta_contexts()
    handle.add_meta_context("base:")
    handle.opt_list_meta_context(lambda c: contexts.append(c) and 0)
    expect(contexts == ["base:allocation"], f"contexts {contexts}")
    handle.clear_meta_contexts()
    handle.add_meta_context("nobody:knows")
    handle.add_meta_context("base:allocation")
    handle.opt_go()
    expect(handle.get_size() == size, "GO after all that")
    expect(handle.can_meta_context("base:allocation"), "base:allocation is not given")
    expect(not handle.can_meta_context("nobody:knows"), "a context of nobody's is given")
    handle.shutdown()
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.opt_abort()


CASES = {
    "structured reads": structured_reads,
    "simple replies": simple_replies,
    "block status": block_status,
    "FUA": fua_everywhere,
    "write zeroes": zeroes,
    "32 MiB": largest_requests,
    "single bytes": single_bytes,
    "outside the disk": outside,
    "several connections": several_connections,
    "much under way": much_under_way,
    "options": options,
}


class Raw:
    """A client that sends what it likes."""

    def __init__(self, path, flags=3):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(path)
        magic, option, self.server_flags = struct.unpack(">8sQH", self.take(18))
        expect(magic == b"NBDMAGIC" and option == OPTION, "another greeting")
        if flags is not None:
            self.socket.sendall(struct.pack(">I", flags))

    def take(self, count):
        out = b""
        while len(out) < count:
            part = self.socket.recv(count - len(out))
            if not part:
                raise EOFError(f"closed after {len(out)} of {count} bytes")
            out += part
        return out

    def option(self, number, data=b"", length=None, magic=OPTION):
        self.socket.sendall(struct.pack(">QII", magic, number, len(data) if length is None else length) + data)

    def reply(self):
        magic, option, kind, length = struct.unpack(">QIII", self.take(20))
        expect(magic == OPTION_REPLY, "another magic number in a reply")
        return option, kind, self.take(length)

    def request(self, kind, offset, length, data=b"", flags=0, magic=REQUEST, cookie=77):
        self.socket.sendall(struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length) + data)

    def simple(self):
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        expect(magic == SIMPLE, f"not a simple reply: {magic:x}")
        return error, cookie

    def pour(self, data):
        """Sends what nobody may want to have, and no more after it."""
        try:
            self.socket.sendall(data)
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def closed(self):
        """The server ends the connection, and says nothing senseless before."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass

    def close(self):
        self.socket.close()


def export_name(path, name, size):
    for flags, padding in ((3, 0), (1, 124), (0, 124)):
        client = Raw(path, flags)
        client.option(1, name.encode())
        got, abilities = struct.unpack(">QH", client.take(10))
        expect(got == size and abilities & 1, f"size {got}, flags {abilities:x}")
        expect(client.take(padding) == bytes(padding), "the padding is no zeros")
        client.request(1, 0, 512, b"\x51" * 512)
        expect(client.simple() == (0, 77), "a write fails")
        client.request(0, 0, 512)
        expect(client.simple() == (0, 77) and client.take(512) == b"\x51" * 512, "a read fails")
        client.request(2, 0, 0)
        client.closed()
    client = Raw(path)
    client.option(1, b"no such export")
    client.closed()


def unknown_option(path, name, size):
    client = Raw(path)
    client.option(4711, b"what?")
    expect(client.reply()[:2] == (4711, 0x80000001), "it is not called unsupported")
    client.option(6, b"\0")
    expect(client.reply()[1] & 0x80000000, "a malformed INFO is not refused")
    client.option(3, b"no data allowed")
    expect(client.reply()[1] & 0x80000000, "a LIST with data is not refused")
    client.option(2)
    expect(client.reply()[:2] == (2, 1), "ABORT is not acknowledged")
    client.closed()


def garbage_option(path, name, size):
    client = Raw(path)
    client.option(3, magic=0x1234)
    client.closed()
    client = Raw(path)
    client.option(6, length=0xFFFFFFFF)
    client.pour(bytes(100_000))
    client.closed()
    client = Raw(path, 0xFFFF)
    client.closed()


def transmission(path, name):
    client = Raw(path, 3)
    client.option(1, name.encode())
    client.take(10)
    return client


def garbage_request(path, name, size):
    client = transmission(path, name)
    client.request(0, 0, 512, magic=0x11223344)
    client.closed()


def unknown_command(path, name, size):
    client = transmission(path, name)
    client.request(99, 0, 512)
    expect(client.simple() == (22, 77), "an unknown command is not refused")
    client.request(0, 0, 512)
    expect(client.simple() == (0, 77), "the connection does not go on")
    client.take(512)
    client.close()


def oversized_write(path, name, size):
    client = transmission(path, name)
    client.request(1, 0, 0x7FFFFFFF)
    client.pour(bytes(1 << 20))
    client.closed()


def leaves_in_the_middle(path, name, size):
    """Clients that go away at any byte of a write leave the disk and the server as they are."""
    keeper = transmission(path, name)
    keeper.request(1, 8 * MIB, 4096, b"\x61" * 4096)
    expect(keeper.simple() == (0, 77), "a write fails")
    for sent in (1, 27, 28, 29, 1000, 4095 + 28):
        client = transmission(path, name)
        whole = struct.pack(">IHHQQI", REQUEST, 0, 1, 1, 8 * MIB, 4096) + b"\x62" * 4096
        client.socket.sendall(whole[:sent])
        client.close()
    keeper.request(0, 8 * MIB, 4096)
    expect(keeper.simple() == (0, 77) and keeper.take(4096) == b"\x61" * 4096, "half a write reached the disk")
    keeper.close()


def slow_greeting(path, name, size):
    """A client that says nothing holds nobody up."""
    silent = [Raw(path, None) for _ in range(20)]
    client = transmission(path, name)
    client.request(0, 0, 512)
    expect(client.simple() == (0, 77), "another client is held up")
    client.take(512)
    client.close()
    for one in silent:
        one.close()


RAW = {
    "EXPORT_NAME": export_name,
    "unknown options": unknown_option,
    "garbage instead of an option": garbage_option,
    "garbage instead of a request": garbage_request,
    "an unknown command": unknown_command,
    "a write of 2 GiB": oversized_write,
    "a client that leaves in the middle": leaves_in_the_middle,
    "clients that say nothing": slow_greeting,
}
