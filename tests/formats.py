#!/usr/bin/python3
"""What a protected pair left on its disks, read by a second reader that knows docs/format.md and nothing else: the
journal, opened with the policy's key and played over an empty disk, is the source's disk, byte for byte.

Needs qemu-io (qemu-utils), nbdcopy (libnbd-bin), python3-cryptography, python3-lz4.
"""

import collections
import uuid

import journal_reader
from cluster import MIB, ROOT, Cluster, Failed, Tests, eventually, expect, random_file, run, workspace

DISKS = {"data": 24 * MIB, "log": 8 * MIB}
WRITES, ZEROS = (1, 9), (2, 3, 10)
CUT, JOIN, SYNC_BEGIN, SYNC_END = 4, 5, 8, 12


def golden(name):
    """Bytes that the product's own tests pin: hexadecimal lines, and runs of zeros."""
    out = b""
    for line in (ROOT / "wire/tests/golden" / f"{name}.hex").read_text().splitlines():
        out += bytes(int(line[6:])) if line.startswith("zeros ") else bytes.fromhex(line)
    return out


def ident(first):
    return str(uuid.UUID(bytes=bytes(range(first, first + 16))))


def up(first):
    """A number whose bytes count up from its highest."""
    return int.from_bytes(range(first, first + 8), "big")


def pinned_bytes():
    """Each structure whose bytes are pinned says by the document what its writer meant."""
    disks = [{"slot": slot, "id": ident(0x10 + slot), "size": 1 << 30, "block": 512, "physical": 4096,
              "serial": f"serial-{slot}", "name": f"disk é {slot}"} for slot in (0, 3, 7)]
    predecessor = (ident(0x70), up(0x01), up(0x11))
    same(journal_reader.body(5, golden("disk-info")), disks[1])
    same(journal_reader.body(4, golden("cut-plain")), {"number": up(1), "bits": 0, "label": ""})
    same(journal_reader.body(4, golden("cut-label")), {"number": 9, "bits": 3, "label": "before üpgrade"})
    same(journal_reader.body(8, golden("sync-mark")), {"number": up(1), "whole": 1})
    hello = journal_reader.handshake(golden("handshake-hello"))
    same(hello, {"kind": 1, "stream": ident(0x20), "incarnation": ident(0x40), "predecessor": predecessor,
                 "key": golden("wrapped-key"), "first": up(0x21), "next": up(0x31),
                 "disks": [(disks[0], 1), (disks[2], up(0x41))]})
    welcome = journal_reader.handshake(golden("handshake-welcome-accepted"))
    same(welcome, {"kind": 2, "timeline": ident(0x30), "position": (ident(0x40), up(1), up(0x11)), "whole": 1})
    same(journal_reader.handshake(golden("handshake-begin")), {"kind": 4})
    nobody = str(uuid.UUID(int=0))
    for reason, name, disk, value in ((1, "unknown-stream", nobody, 0), (2, "version", nobody, 0x102), (4, "branch", nobody, 0),
                                      (3, "fenced", ident(0x10), up(0x41)), (5, "seq-behind", nobody, up(0x11)),
                                      (6, "busy", nobody, 0), (7, "unable", nobody, 0), (8, "bad-claim", nobody, 0)):
        same(journal_reader.handshake(golden(f"handshake-welcome-refused-{reason}-{name}")),
             {"kind": 3, "reason": reason, "disk": disk, "value": value, "text": "because"})
    for name, fields in (("ready", (1, 0, 0, 0, 0)), ("ack", (2, 0, up(1), up(0x11), 0)), ("alive", (3, 0, 0, 0, 0)),
                         ("stop-1-fenced", (4, 1, 0, 0, up(1))), ("stop-6-shutting-down", (4, 6, 0, 0, up(1))),
                         ("compared", (5, 0, 0, up(0x11), up(0x21))), ("want", (6, 0x1718, 0, up(1), up(0x21)))):
        same(journal_reader.control(golden(f"control-{name}")), fields)
    state = journal_reader.stream_state(golden("stream-state"))
    same((state["stream"], state["floor"], state["cut"]), (ident(0x20), up(1), up(0x11)))
    same([(d["id"], d["bits"], d["open"]) for d in state["disks"]],
         [(ident(0x10), 1, [(0x102, 1), (7, 2)]), (ident(0x17), 2, [])])
    same(state["incarnations"], [ident(0x40), ident(0x41)])
    same([(v["timeline"], v["seq"], v["kind"], v["bits"], v["name"]) for v in state["views"]],
         [(ident(0x31), up(0x21), 2, 0, "view 49"), (ident(0x32), up(0x21), 3, 1, "view 50")])
    same(state["unreadable"], [(7, up(0x31) & ~0xFFF, 4096)])
    table = journal_reader.timeline_table(golden("timeline-table"))
    same([(t["id"], t["kind"], t["fork"] & 0xFF, t["reason"]) for t in table["timelines"]],
         [(ident(0x30), 1, 0x30, ""), (ident(0x31), 2, 0x31, "failover to cut 7"), (ident(0x32), 3, 0x32, "look"),
          (ident(0x33), 4, 0x33, "fenced")])
    same([(d["slot"], d["generation"], d["timeline"], d["member"]) for d in table["disks"]],
         [(0, 2, ident(0x31), 1), (7, 1, ident(0x30), 0)])
    same(table["fences"], [{"generation": 2, "seq": up(0x31), "incarnation": ident(0x40), "wall": up(0x41), "zero_loss": 1,
                            "reason": "failover", "disks": [ident(0x10), ident(0x17)]}])
    keys = journal_reader.keys_file(golden("keys-file"))
    same((keys["stream"], keys["site_key"], keys["recovery_key"]), (ident(0x20), ident(0x50), ident(0x60)))
    same((keys["retention"], keys["name"]), (up(1), "shöp"))
    sealed = lambda first: bytes(range(first, first + 60))  # noqa: E731
    same(keys["keys"], [(ident(0x70), sealed(0x80), sealed(0xC0)), (ident(0x71), sealed(0x81), None)])
    same([(d["slot"], d["generation"]) for d in keys["disks"]], [(0, 2), (7, up(0x11))])
    for version, name in ((1, ""), (2, "-2"), (3, "-3")):
        log = golden(f"intent-header{name}") + bytes(4096)
        header, _ = journal_reader.intent_log(log)
        same((header["serial"], header["disk"], header["stream"], header["bits"], header["generation"], header["lease_at"]),
             (up(1), ident(0x10), ident(0x20), 63, up(0x61), 0x21 << 56 | up(0xA1) & (1 << 56) - 1))
        same((header["identity"], header["log_identity"]), (up(0xA1), up(0xB1) if version > 1 else 0))
        same(header["promised"], 0xC1C2C3C4 if version > 2 else 0)
    frame = golden("frame-unsealed")
    same(journal_reader.crc_with_hole(frame, 12), int.from_bytes(frame[12:16], "little"))
    same(journal_reader.seal_of(frame, up(1), 0x0A0B0C0D), (golden("nonce"), golden("associated-data")))
    same(journal_reader.witness(golden("intent-witness")), {"disk": ident(0x10), "stream": ident(0x20), "serial": up(1)})


def same(found, wanted):
    expect(found == wanted, f"{found} instead of {wanted}")


def policy_keys(stream, state):
    """Beside the journal, by the key of the site; they are those of the state that the target keeps."""
    file = journal_reader.keys_file((stream / "keys").read_bytes())
    same((file["stream"], file["name"]), (stream.name, Cluster.GROUP))
    same(sorted(d["size"] for d in file["disks"]), sorted(DISKS.values()))
    keys = journal_reader.open_keys(file, "site", journal_reader.site_key(state))
    same(keys, journal_reader.state_keys(state))
    expect(len(keys) == 1, f"{len(keys)} keys of a group whose key was never rotated")
    return keys


def work(cluster, folder):
    """Writes of every kind, over both disks; compressible and not, small and large, a zero and a discard."""
    data, log = cluster.uri("data"), cluster.uri("log")
    random_file(folder / "some.img", 3 * MIB, 5)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", folder / "some.img", log)
    run("qemu-io", "-f", "raw", "-c", "write -P 0x11 1M 5000k", "-c", "write -P 0x12 512 512", "-c", "write -z 2M 1M",
        "-c", "discard 4M 256k", "-c", "write -P 0x13 4200k 8k", "-c", "flush", data)
    run("qemu-io", "-f", "raw", *[word for n in range(64) for word in ("-c", f"write -P {n + 1} {n * 97 % 64 * 8}k 4k")], log)


def stopped(folder):
    """A pair that has worked, whose source was killed, that was written to in a view, and is stopped."""
    cluster = Cluster(folder, DISKS)
    try:
        work(cluster, folder)
        cluster.settle()
        # A second life of the source: another incarnation and key, and extents in doubt to be compared.
        cluster.source.kill()
        cluster.source.start()
        eventually("the source is connected again", cluster.proxies_connected)
        eventually("the group is protected again", cluster.protected, timeout=60)
        run("qemu-io", "-f", "raw", "-c", "write -P 0x21 9M 300k", "-c", "flush", cluster.uri("data"))
        cluster.command("point", "cut", Cluster.GROUP, "--label", "before the night")
        cluster.settle()
        view = cluster.open_view("scratch", writable=True)
        run("qemu-io", "-f", "raw", "-c", "write -P 0x77 12M 64k", "-c", "flush", view["data"])
    finally:
        cluster.close()
    [stream] = (folder / "journal" / "streams").iterdir()
    return stream


READ = {}


def segments(stream, keys):
    """By timeline, in order: (head, frames). Read once: the reader is thorough, and not fast."""
    if stream in READ:
        return READ[stream]
    lines = collections.defaultdict(list)
    for path in stream.glob("segments/*.seg"):
        head, frames = journal_reader.segment(path, keys)
        expect(path.name == f"{head['timeline']}-{head['segment']:016x}.seg", f"{path.name} holds {head['segment']}")
        lines[head["timeline"]].append((head, frames))
    for line in lines.values():
        line.sort(key=lambda segment: segment[0]["segment"])
    READ[stream] = lines
    return lines


def play(images, records):
    for record in records:
        at, length = record["offset"], record["length"]
        if record["kind"] in WRITES:
            expect(len(record["body"]) == length, f"record {record['seq']} has {len(record['body'])} of {length} bytes")
            images[record["slot"]][at:at + length] = record["body"]
        elif record["kind"] in ZEROS:
            images[record["slot"]][at:at + length] = bytes(length)


def journal_is_the_disk(folder, stream, keys):
    table = journal_reader.timeline_table((stream / "timelines").read_bytes())
    expect(table["floor"] == 0, "something was folded; the test is too slow for its retention")
    main = next(t["id"] for t in table["timelines"] if t["kind"] == 1)
    records = [r for _, frames in segments(stream, keys)[main] for _, _, found in frames for r in found]
    images = {disk["slot"]: bytearray(disk["size"]) for disk in table["disks"]}
    play(images, records)
    for disk in table["disks"]:
        content = (folder / f"{disk['name']}.img").read_bytes()
        expect(content == images[disk["slot"]], f"disk {disk['name']}: the journal is not what the disk holds")
        expect(any(content), f"disk {disk['name']} is empty: nothing was tested")
    kinds = collections.Counter(r["kind"] for r in records)
    for kind in (1, CUT, JOIN, SYNC_BEGIN, SYNC_END):
        expect(kinds[kind], f"no record of kind {kind} among {kinds}")
    expect(kinds[2] + kinds[3] >= 2, f"zero and discard are not in the journal: {kinds}")
    labels = [r["body"][11:].decode() for r in records if r["kind"] == CUT]
    expect("before the night" in labels, f"the label of a cut is not in the journal: {labels[-3:]}")
    lives = {head["incarnation"]: head for head, _ in segments(stream, keys)[main]}
    expect(len(lives) == 2, f"{len(lives)} lives of the source where one was killed")
    expect([head["predecessor"][0] in lives for head in lives.values()] == [False, True], "the second follows the first")
    last = 0
    for record in records:
        expect(record["seq"] > last, f"record {record['seq']} after {last}")
        last = record["seq"]


def state_is_of_the_stream(stream, keys):
    """The stream state agrees with the timeline table and the journal."""
    state = journal_reader.stream_state((stream / "state").read_bytes())
    table = journal_reader.timeline_table((stream / "timelines").read_bytes())
    expect(state["stream"] == table["stream"] == stream.name, f"stream {state['stream']} in {stream.name}")
    expect(state["floor"] <= table["floor"], f"floors {state['floor']} and {table['floor']}")
    images = {path.stem: path.stat().st_size for path in stream.glob("replica/*.img")}
    expect(images == {disk["id"]: disk["size"] for disk in table["disks"]}, f"images {images}")
    [view] = [t for t in table["timelines"] if t["kind"] == 3]
    [said] = state["views"]
    same((said["timeline"], said["seq"], said["kind"], said["name"]), (view["id"], view["fork"], 3, f"{Cluster.GROUP}.scratch"))
    expect(set(said["disks"]) == {disk["id"] for disk in table["disks"]}, f"disks of the view: {said['disks']}")
    main = next(t["id"] for t in table["timelines"] if t["kind"] == 1)
    found = segments(stream, keys)[main]
    for _, frames in found:
        for record in (r for _, _, records in frames for r in records if r["kind"] in (CUT, JOIN, SYNC_BEGIN, SYNC_END)):
            journal_reader.body(record["kind"], record["body"])


def delta_is_a_timeline(stream, keys):
    table = journal_reader.timeline_table((stream / "timelines").read_bytes())
    [view] = [t for t in table["timelines"] if t["kind"] == 3]
    frames = [f for _, frames in segments(stream, keys)[view["id"]] for f in frames]
    records = [r for _, _, found in frames for r in found if r["kind"] == 1]
    written = b"".join(r["body"] for r in sorted(records, key=lambda r: r["offset"]))
    expect(written == b"\x77" * 65536, f"the delta holds {len(written)} bytes")
    expect(records[0]["seq"] > view["fork"], "a delta's numbers go on behind the fork")


def intent_logs(folder):
    logs = list((folder / "source-state" / "intent").glob("*.intent"))
    expect(len(logs) == len(DISKS), f"{len(logs)} logs")
    for path in logs:
        header, marked = journal_reader.intent_log(path.read_bytes())
        expect(header["disk"] == path.stem and header["size"] in DISKS.values(), f"log {path.stem}: {header}")
        expect(header["bits"] & 2, f"a clean stop is not said: {header}")
        expect(all(extent * 4 * MIB < header["size"] for extent in marked), f"extents past the end: {marked}")
        expect(header["log_identity"] != 0, f"which file it is is not said: {header}")
        witness = journal_reader.witness((folder / "source-state" / "witness" / f"{path.stem}.witness").read_bytes())
        expect((witness["disk"], witness["stream"]) == (header["disk"], header["stream"]), f"witness {path.stem}: {witness}")
        expect(0 < witness["serial"] <= header["reached"], f"witness {path.stem}: {witness}, log: {header}")


def damage_is_seen(stream, keys):
    """The reader can fail: each flipped bit in a frame is found."""
    path = sorted(stream.glob("segments/*.seg"))[0]
    data = bytearray(path.read_bytes())
    head = journal_reader.segment_head(bytes(data), keys)
    length = journal_reader.frame(bytes(data), head["length"], head)[0]
    for at in (head["length"] + 8, head["length"] + 50, head["length"] + length - 1):
        data[at] ^= 1
        try:
            journal_reader.frame(bytes(data), head["length"], head)
        except journal_reader.Wrong:
            data[at] ^= 1
            continue
        raise Failed(f"the flipped bit at {at} is not seen")


def main():
    tests = Tests()
    tests.run("formats: bytes that are pinned, read by the document", pinned_bytes)
    with workspace("formats") as folder:
        stream = stopped(folder)
        keys = policy_keys(stream, folder / "target-state")
        tests.run("formats: the journal, read by the document, is the source's disks", journal_is_the_disk, folder, stream, keys)
        tests.run("formats: a view's delta is a timeline in the journal's format", delta_is_a_timeline, stream, keys)
        tests.run("formats: the stream state agrees with table and journal", state_is_of_the_stream, stream, keys)
        tests.run("formats: the write-intent logs say a clean stop", intent_logs, folder)
        tests.run("formats: a flipped bit is found", damage_is_seen, stream, keys)
    tests.end()


if __name__ == "__main__":
    main()
