"""A second reader of what lies on disks, written from docs/format.md alone: where it and the product disagree, the
document or the product is wrong. It checks everything that the document says can be checked.
"""

import base64
import hashlib
import hmac
import json
import struct
import uuid

import lz4.block
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BLOCK = 4096
MIB = 1 << 20
ZEROS = bytes(16)


class Wrong(Exception):
    """The bytes are not what the document says."""


def check(condition, message):
    if not condition:
        raise Wrong(message)


def _table():
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


TABLE = _table()


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def crc_with_hole(data, at):
    """CRC32C of a structure whose CRC stands at `at` and counts as 0."""
    return crc32c(data[:at] + bytes(4) + data[at + 4:])


class Input:
    """Fields, one after another."""

    def __init__(self, data, at=0):
        self.data, self.at = data, at

    def take(self, layout):
        fields = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return fields[0] if len(fields) == 1 else fields

    def id(self):
        return str(uuid.UUID(bytes=self.take("16s")))

    def text(self):
        length = self.take("H")
        check(length <= 255, f"a text of {length} bytes")
        return self.take(f"{length}s").decode()

    def place(self):
        return (self.id(), *self.take("QQ"))

    def end(self, what):
        check(self.at == len(self.data), f"bytes behind {what}")

    def disk(self):
        slot, ident = self.take("H"), self.id()
        size, block, physical = self.take("QII")
        for length in (block, physical):
            check(512 <= length <= 65536 and length & length - 1 == 0, f"a block of {length} bytes")
        check(size % block == 0, "a disk of half a block")
        return {"slot": slot, "id": ident, "size": size, "block": block, "physical": physical,
                "serial": self.text(), "name": self.text()}


def wrapped_key(raw, policy_keys, incarnation):
    """The data key of an incarnation."""
    key_id, nonce, sealed, rest = struct.unpack("<16s12s48s20s", raw)
    check(rest == bytes(20), "no zeros behind a wrapped key")
    key = policy_keys[str(uuid.UUID(bytes=key_id))]
    return AESGCM(key).decrypt(nonce, sealed, uuid.UUID(incarnation).bytes)


def segment_head(data, policy_keys):
    source = Input(data)
    magic, version, zero, length, crc = source.take("4sHHII")
    check(magic == b"AISG" and version == 1 and zero == 0, "not a segment of version 1")
    check(length % BLOCK == 0, f"a head of {length} bytes")
    check(crc_with_hole(data[:length], 12) == crc, "CRC of a segment's head")
    head = {"length": length, "stream": source.id(), "timeline": source.id(), "incarnation": source.id()}
    head["predecessor"] = source.place()
    head["segment"], head["first_frame"], head["first_seq"], head["created"] = source.take("QQQQ")
    check(source.at == 128, "offset of the wrapped key")
    head["key"] = wrapped_key(source.take("96s"), policy_keys, head["incarnation"])
    disks, zeros = source.take("H6s")
    check(zeros == bytes(6), "no zeros behind the number of disks")
    head["disks"] = [source.disk() for _ in range(disks)]
    check(not any(data[source.at:length]), "no zeros at the end of a head")
    return head


def frame(data, at, head):
    """The frame at this place: (its length, number, acked, records), or None where none begins."""
    if len(data) < at + 96 or data[at:at + 4] != b"AIFR":
        return None
    version, chunks, length, crc = struct.unpack_from("<HHII", data, at + 4)
    check(version == 1 and length % BLOCK == 0 and 0 < length <= 2 << 20 and 1 <= chunks <= 64, f"the frame at {at}")
    raw = data[at:at + length]
    check(crc_with_hole(raw, 12) == crc, f"CRC of the frame at {at}")
    source = Input(raw, 16)
    check(source.id() == head["stream"], "a frame of another stream")
    check(source.id() == head["incarnation"], "a frame of another incarnation")
    number, acked, first, last, _mono, _sync_ms, zeros = source.take("QQQQQII")
    check(zeros == 0, "no zeros at 92")
    check(1 <= first <= last and acked < number, f"numbers of the frame at {at}")
    records, end = [], 96 + 8 * chunks
    for index in range(chunks):
        begin, sealed = source.take("II")
        check(begin % 16 == 0 and begin >= end, f"chunk {index} at {begin}")
        check(not any(raw[end:begin]), "no zeros between chunks")
        end = begin + sealed
        nonce, known = seal_of(raw, number, index)
        records += chunk(AESGCM(head["key"]).decrypt(nonce, raw[begin:end], known))
    check(not any(raw[end:]), "no zeros behind the last chunk")
    check([r["seq"] for r in records] == list(range(first, last + 1)), f"records of frame {number} have gaps")
    return length, number, acked, records


def seal_of(raw, number, index):
    """Nonce and associated data of a chunk of that frame."""
    return struct.pack("<QI", number, index), raw[0:8] + raw[16:96] + struct.pack("<I", index)


def chunk(plain):
    """The records of an opened chunk."""
    count, codec, zero, length, stored, zeros = struct.unpack_from("<HBBIII", plain)
    check(zero == 0 and zeros == 0 and codec in (0, 1), "head of a chunk")
    payload = plain[16 + 56 * count:]
    check(len(payload) == stored, f"{len(payload)} bytes of payload, {stored} are said")
    if codec == 1:
        payload = lz4.block.decompress(payload, uncompressed_size=length)
    check(len(payload) == length and length <= MIB, "length of a chunk's payload")
    records = []
    for index in range(count):
        fields = struct.unpack_from("<QQQQIIIIHBBI", plain, 16 + 56 * index)
        seq, offset, mono, wall, length, at, size, crc, slot, kind, zero, zeros = fields
        check(zero == 0 and zeros == 0, "no zeros in a record")
        body = payload[at:at + size]
        check(len(body) == size and crc32c(body) == crc, f"CRC of record {seq}")
        records.append({"seq": seq, "kind": kind, "slot": slot, "offset": offset, "length": length, "mono": mono,
                        "wall": wall, "body": body})
    check(1 <= count <= 256, f"a chunk of {count} records")
    check(len(payload) <= 65536 or sum(1 for r in records if r["body"]) == 1, f"a chunk of {len(payload)} bytes of many records")
    return records


def segment(path, policy_keys):
    """(head, [(frame number, acked, records)]) of a whole file; what lies behind the last frame is not looked at."""
    data = path.read_bytes()
    head = segment_head(data, policy_keys)
    at, frames = head["length"], []
    while found := frame(data, at, head):
        length, number, acked, records = found
        check(number == (frames[-1][0] + 1 if frames else head["first_frame"]), f"frame {number} is out of order")
        check(acked < number, f"frame {number} says that {acked} was acknowledged")
        frames.append((number, acked, records))
        at += length
    return head, frames


def table_head(data, wanted, what):
    """What follows the head that all tables have."""
    source = Input(data)
    magic, version, zero, crc, length = source.take("4sHHII")
    check(magic == wanted and version == 1 and zero == 0, f"not a {what} of version 1")
    check(length == len(data), f"{len(data)} bytes, {length} are said")
    check(crc_with_hole(data, 8) == crc, f"CRC of a {what}")
    return source


def timeline_table(data):
    source = table_head(data, b"AITL", "timeline table")
    table = {"stream": source.id(), "current": source.id()}
    table["floor"], timelines, disks, fences, zero = source.take("QHHHH")
    check(zero == 0 and source.at == 64, "head of a timeline table")
    table["timelines"] = []
    for _ in range(timelines):
        ident, parent = source.id(), source.id()
        fork, created, kind = source.take("QQB")
        table["timelines"].append({"id": ident, "parent": parent, "fork": fork, "kind": kind, "reason": source.text()})
    table["disks"] = []
    for _ in range(disks):
        disk = source.disk()
        disk["generation"], disk["timeline"] = source.take("Q"), source.id()
        disk["member"] = source.take("B")
        table["disks"].append(disk)
    table["fences"] = []
    for _ in range(fences):
        generation, seq = source.take("QQ")
        fence = {"generation": generation, "seq": seq, "incarnation": source.id()}
        fence["wall"], fence["zero_loss"] = source.take("QB")
        fence["reason"] = source.text()
        fence["disks"] = [source.id() for _ in range(source.take("H"))]
        table["fences"].append(fence)
    check(source.at == len(data), "bytes behind a timeline table")
    return table


def stream_state(data):
    source = table_head(data, b"AISS", "stream state")
    state = {"stream": source.id()}
    state["floor"], state["cut"], disks, incarnations, views, zero, ranges, zeros = source.take("QQHHHHII")
    check(zero == 0 and zeros == 0 and source.at == 64, "head of a stream state")
    state["disks"] = []
    for _ in range(disks):
        disk = source.disk()
        disk["bits"], count = source.take("BB")
        disk["open"] = [source.take("QB") for _ in range(count)]
        check(disk["bits"] < 4 and all(bits < 4 for _, bits in disk["open"]), "bits of a disk")
        state["disks"].append(disk)
    state["incarnations"] = [source.id() for _ in range(incarnations)]
    state["views"] = []
    for _ in range(views):
        view = {"timeline": source.id()}
        view["seq"], view["kind"], view["bits"] = source.take("QBB")
        check(view["kind"] in (2, 3) and view["bits"] < 2, "kind of a view")
        view["name"] = source.text()
        view["disks"] = [source.id() for _ in range(source.take("H"))]
        state["views"].append(view)
    state["unreadable"] = [source.take("HQQ") for _ in range(ranges)]
    source.end("a stream state")
    return state


def body(kind, payload):
    """What a record carries that is no data of a disk."""
    source = Input(payload)
    if kind == 4:
        number, bits = source.take("QB")
        check(bits < 4, "bits of a cut")
        found = {"number": number, "bits": bits, "label": source.text()}
    elif kind in (5, 14):
        found = source.disk()
    else:
        number, whole = source.take("QB")
        check(kind in (8, 12) and whole < 2, "a mark of a synchronisation")
        found = {"number": number, "whole": whole}
    source.end(f"the payload of a record of kind {kind}")
    return found


def handshake(data):
    """A whole message."""
    source = Input(data)
    length, kind = source.take("IB")
    check(length == len(data) - 4 and length <= MIB, f"a message of {length} bytes")
    found = {"kind": kind}
    if kind == 1:
        magic, version, connection = source.take("4sHH")
        check(magic == b"AIHI" and version == 1 and connection == 0, "a hello")
        found |= {"stream": source.id(), "incarnation": source.id(), "predecessor": source.place(), "key": source.take("96s")}
        found["first"], found["next"], disks = source.take("QQH")
        found["disks"] = [(source.disk(), source.take("Q")) for _ in range(disks)]
    elif kind == 2:
        found |= {"timeline": source.id(), "position": source.place(), "whole": source.take("B")}
    elif kind == 3:
        found |= {"reason": source.take("B"), "disk": source.id(), "value": source.take("Q"), "text": source.text()}
    else:
        check(kind == 4, f"a message of kind {kind}")
    source.end("a message")
    return found


def control(plain):
    """An opened control message: kind, detail, frame, seq, value."""
    kind, zero, zeros, *fields = struct.unpack("<BBHIQQQ", plain)
    check(zero == 0 and zeros == 0 and kind in range(1, 7), "a control message")
    return (kind, *fields)


def intent_log(data):
    """The header that counts, and the set of marked extents."""
    best = None
    for at in (0, BLOCK):
        raw = data[at:at + BLOCK]
        magic, version, zero, crc, zeros, serial = struct.unpack_from("<4sHHIIQ", raw)
        if magic == b"AIIL" and crc_with_hole(raw, 8) == crc and (best is None or serial > best["serial"]):
            check(version in (1, 2, 3) and zero == 0 and zeros == 0, "header of a write-intent log")
            source = Input(raw, 24)
            best = {"serial": serial, "disk": source.id(), "size": source.take("Q"), "stream": source.id(),
                    "incarnation": source.id(), "boot": source.id()}
            names = ("acked_frame", "acked_record", "reserved", "cut", "synchronisations", "generation", "bits", "changed")
            best.update(zip(names, source.take("QQQQQQBQ")))
            best["prior"], best["spilled"] = source.place(), source.place()
            best["complete"], best["identity"], best["lease_at"], best["log_identity"] = source.take("QQQQ")
            best["promised"] = source.take("I") if version > 2 else 0
            check(version > 1 or best["log_identity"] == 0, "version 1 knows no identity of the log")
            check(best["bits"] < 64 and not any(raw[source.at:]), "the end of a header")
    check(best is not None, "no header of the log is whole")
    marked = set()
    best["reached"] = best["serial"]
    for page, at in enumerate(range(2 * BLOCK, len(data), BLOCK)):
        raw = data[at:at + BLOCK]
        magic, number, crc, stamp = struct.unpack_from("<4sIII", raw)
        check(magic == b"AIIP" and number == page, f"page {page} of the log")
        if stamp:
            ahead = (stamp - best["serial"] + (1 << 31)) % (1 << 32) - (1 << 31)
            best["reached"] = max(best["reached"], best["serial"] + ahead)
        check(crc_with_hole(raw, 8) == crc, f"CRC of page {page}")
        marked |= {(page * 4080 + byte) * 8 + bit for byte, value in enumerate(raw[16:]) for bit in range(8) if value >> bit & 1}
    return best, marked


def witness(data):
    """What a witness of a write-intent log names: disk, stream, serial."""
    check(len(data) == BLOCK, f"a witness of {len(data)} bytes")
    magic, version, zero, crc, zeros = struct.unpack_from("<4sHHII", data)
    check(magic == b"AIIW" and version == 1 and zero == 0 and zeros == 0, "head of a witness")
    check(crc_with_hole(data, 8) == crc, "CRC of a witness")
    source = Input(data, 16)
    found = {"disk": source.id(), "stream": source.id(), "serial": source.take("Q")}
    check(not any(data[source.at:]), "bytes behind a witness")
    return found


def keys_file(data):
    """The keys beside a journal, sealed."""
    source = table_head(data, b"AIKS", "keys file")
    file = {"stream": source.id(), "site_key": source.id(), "recovery_key": source.id()}
    file["retention"], keys, disks, zeros = source.take("QHHI")
    check(zeros == 0 and source.at == 80, "head of a keys file")
    file["name"], file["keys"], file["disks"] = source.text(), [], []
    for _ in range(keys):
        ident, has, site, recovery = source.id(), *source.take("B60s60s")
        check(has in (0, 1) and (has or recovery == bytes(60)), "a key that has none for recovery")
        file["keys"].append((ident, site, recovery if has else None))
    for _ in range(disks):
        disk = source.disk()
        disk["generation"] = source.take("Q")
        file["disks"].append(disk)
    check(source.at == len(data), "bytes behind a keys file")
    return file


def derived(holder, secret, what):
    """From the key of a holder, "site" or "recovery"."""
    return hmac.new(secret, f"afterimage {holder} key v1 {what}".encode(), hashlib.sha256).digest()


def open_key(holder, secret, stream, ident, sealed):
    """A policy key that is sealed under a holder's."""
    bound = f"afterimage {holder} key v1".encode() + uuid.UUID(stream).bytes + uuid.UUID(ident).bytes
    return AESGCM(derived(holder, secret, "seal")).decrypt(sealed[:12], sealed[12:], bound)


def open_keys(file, holder, secret):
    """The keys of a keys file, by their ids."""
    named = str(uuid.UUID(bytes=derived(holder, secret, "id")[:16]))
    check(file[f"{holder}_key"] == named, f"the {holder} key is {named}; the file is under {file[f'{holder}_key']}")
    chosen = {"site": 1, "recovery": 2}[holder]
    return {key[0]: open_key(holder, secret, file["stream"], key[0], key[chosen]) for key in file["keys"]}


def site_key(state):
    """Of a proxy whose site key is wrapped by the file in its state folder."""
    stored = json.loads((state / "site.keys").read_text())
    check(stored["afterimage_site_keys"] == 1 and stored["by"] == "file", f"{stored['by']}")
    wrapped = base64.b64decode(stored["wrapped"])
    return AESGCM((state / "site.key").read_bytes()).decrypt(wrapped[:12], wrapped[12:], b"afterimage wrapping key v1")


def recovery_key(text):
    """As it was printed."""
    text = text.strip()
    check(text.startswith("airk1-"), "a recovery key begins with airk1-")
    raw = base64.b32decode(text[6:].replace("-", "") + "======")
    digest = hashlib.sha256(b"afterimage recovery key text v1" + raw[:32]).digest()
    check(len(raw) == 36 and raw[32:] == digest[:4], "the checksum of a recovery key")
    return raw[:32]


def protobuf(data):
    """The fields of a message: (number, value)."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        else:
            check(tag & 7 == 2, f"a field of wire type {tag & 7}")
            length = varint()
            yield tag >> 3, data[at:at + length]
            at += length


def state_keys(state):
    """The keys in the desired state that a proxy keeps, by their ids (proxy.proto: `sources` 3, `targets` 4)."""
    keys, secret = {}, site_key(state)

    def take(stream, message):
        fields = list(protobuf(message))
        ident = next(value for number, value in fields if number == 1).decode()
        sealed = next(value for number, value in fields if number == 2)
        check(len(sealed) == 60, f"a policy key of {len(sealed)} bytes lies in the state of a proxy")
        keys[ident] = open_key("site", secret, stream, ident, sealed)
        for number, value in fields:
            if number == 3:
                take(stream, value)
    for number, group in protobuf((state / "desired.pb").read_bytes()):
        if number in (3, 4):
            fields = list(protobuf(group))
            stream = next(value for field, value in fields if field == 1).decode()
            take(stream, next(value for field, value in fields if field == 3))
    return keys
