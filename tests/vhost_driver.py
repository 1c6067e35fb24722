"""A driver of a vhost-user-blk disk without a machine around it: one split queue with event indices, `depth` requests under
way. It is as fast as this language is, which keeps a disk busy; what it asks of the device is what Linux's driver asks."""

import array
import mmap
import os
import random
import select
import socket
import struct
import time

MIB = 1 << 20
READ, WRITE, FLUSH = 0, 1, 4
SIZE = 128  # entries of the queue
TABLE, AVAIL, USED, HEADS, DATA = 0, 0x1000, 0x2000, 0x4000, MIB
GUEST = 0x1_0000_0000  # where the guest sees its memory
NEXT, WRITABLE = 1, 2
F_FLUSH, F_EVENT_IDX, F_PROTOCOL, F_VERSION_1 = 1 << 9, 1 << 29, 1 << 30, 1 << 32
PROTOCOL_CONFIG = 1 << 9


class Driver:
    """`depth` requests of `block` bytes each; one descriptor in a list of three for the data."""

    def __init__(self, path, depth=1, block=4096, seed=1):
        self.depth, self.block = depth, block
        self.rng = random.Random(seed)
        length = (DATA + depth * block + MIB - 1) // MIB * MIB
        self.file = os.memfd_create("guest")
        os.ftruncate(self.file, length)
        self.map = mmap.mmap(self.file, length)
        self.words = memoryview(self.map).cast("H")
        # Half of it compresses.
        for slot in range(depth):
            at = DATA + slot * block
            self.map[at:at + block] = (self.rng.randbytes(256) + bytes(256)) * (block // 512)
        self.kick, self.call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
        self.poll = select.poll()
        self.poll.register(self.call, select.POLLIN)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.avail = self.seen = 0
        self._introduce(length)
        for slot in range(depth):
            self._describe(slot)

    def close(self):
        self.socket.close()
        self.words.release()
        self.map.close()
        for descriptor in (self.file, self.kick, self.call):
            os.close(descriptor)

    # The socket.

    def _tell(self, request, payload=b"", descriptors=()):
        message = struct.pack("=III", request, 1, len(payload)) + payload
        socket.send_fds(self.socket, [message], list(descriptors))

    def _ask(self, request, payload=b""):
        self._tell(request, payload)
        head = self._receive(12)
        return self._receive(struct.unpack("=III", head)[2])

    def _receive(self, length):
        out = b""
        while len(out) < length:
            part = self.socket.recv(length - len(out))
            if not part:
                raise ConnectionError("the device has ended the connection")
            out += part
        return out

    def _introduce(self, length):
        number = lambda value: struct.pack("=Q", value)
        state = lambda value: struct.pack("=II", 0, value)
        user = 0x7000_0000_0000
        self._tell(3)
        offered, = struct.unpack("=Q", self._ask(1))
        wanted = F_FLUSH | F_EVENT_IDX | F_PROTOCOL | F_VERSION_1
        if offered & wanted != wanted:
            raise ValueError(f"features are missing: {offered:x}")
        protocol, = struct.unpack("=Q", self._ask(15))
        self._tell(16, number(protocol & PROTOCOL_CONFIG))
        self._tell(2, number(wanted))
        config = self._ask(24, struct.pack("=III", 0, 8, 0) + bytes(8))
        self.sectors, = struct.unpack("<Q", config[12:20])
        self._tell(5, struct.pack("=II4Q", 1, 0, GUEST, length, user, 0), [self.file])
        self._tell(8, state(SIZE))
        self._tell(10, state(0))
        self._tell(9, struct.pack("=II4Q", 0, 0, user + TABLE, user + USED, user + AVAIL, 0))
        self._tell(12, number(0), [self.kick])
        self._tell(13, number(0), [self.call])
        self._tell(18, state(1))

    # The queue.

    def _describe(self, slot):
        first, head = slot * 3, HEADS + slot * 32
        put = lambda index, *fields: struct.pack_into("<QIHH", self.map, TABLE + index * 16, *fields)
        put(first, GUEST + head, 16, NEXT, first + 1)
        put(first + 1, GUEST + DATA + slot * self.block, self.block, NEXT, first + 2)
        put(first + 2, GUEST + head + 16, 1, WRITABLE, 0)

    def _offer(self, slot, kind, sector):
        struct.pack_into("<IIQB", self.map, HEADS + slot * 32, kind, 0, sector, 0xcc)
        self.words[(TABLE + (slot * 3 + 1) * 16 + 12) // 2] = NEXT if kind == WRITE else NEXT | WRITABLE
        self.words[(AVAIL + 4) // 2 + self.avail % SIZE] = slot * 3
        self.avail = (self.avail + 1) & 0xffff

    def _publish(self, before):
        self.words[(AVAIL + 2) // 2] = self.avail
        wanted = self.words[(USED + 4 + SIZE * 8) // 2]
        if (self.avail - wanted - 1) & 0xffff < (self.avail - before) & 0xffff:
            os.eventfd_write(self.kick, 1)

    def _wait(self):
        """Until the device has ended a request: asks to be called, and sleeps."""
        used = (USED + 2) // 2
        if self.words[used] != self.seen:
            return
        self.words[(AVAIL + 4 + SIZE * 2) // 2] = self.seen
        limit = time.monotonic() + 30
        while self.words[used] == self.seen:
            if self.poll.poll(20):
                os.eventfd_read(self.call)
            elif time.monotonic() > limit:
                raise TimeoutError("a request has not ended")
            else:
                # Without a fence between setting what is wanted and looking, a call can be missed, and a kick.
                os.eventfd_write(self.kick, 1)

    def load(self, kind, seconds):
        """Requests at random places for that long. How many ended, and how long each took, in microseconds."""
        blocks = self.sectors * 512 // self.block
        places = [self.rng.randrange(blocks) * (self.block // 512) for _ in range(4096)]
        times = array.array("d", bytes(8 * self.depth))
        took = array.array("d")
        now = time.perf_counter()
        until, count, under_way = now + seconds, 0, self.depth
        before = self.avail
        for slot in range(self.depth):
            times[slot] = now
            self._offer(slot, kind, places[slot])
        self._publish(before)
        used = (USED + 2) // 2
        while under_way:
            self._wait()
            now = time.perf_counter()
            before = self.avail
            end = self.words[used]
            while self.seen != end:
                first = self.words[(USED + 4) // 2 + self.seen % SIZE * 4]
                self.seen = (self.seen + 1) & 0xffff
                slot = first // 3
                status = self.map[HEADS + slot * 32 + 16]
                if status:
                    raise OSError(f"a request has ended with status {status}")
                took.append((now - times[slot]) * 1e6)
                count += 1
                if now < until:
                    times[slot] = now
                    self._offer(slot, kind, places[count % len(places)])
                else:
                    under_way -= 1
            if self.avail != before:
                self._publish(before)
        return count, took
