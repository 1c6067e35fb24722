#!/usr/bin/python3
"""What a protected pair left on its disks, read by a second reader that knows docs/format.md and nothing else: the
journal, opened with the policy's key and played over an empty disk, is the source's disk, byte for byte.

Needs qemu-io (qemu-utils), nbdcopy (libnbd-bin), python3-cryptography, python3-lz4.
"""

import collections

import journal_reader
from cluster import MIB, Cluster, Failed, Tests, eventually, expect, random_file, run, workspace

DISKS = {"data": 24 * MIB, "log": 8 * MIB}
WRITES, ZEROS = (1, 9), (2, 3, 10)
CUT, JOIN, SYNC_BEGIN, SYNC_END = 4, 5, 8, 12


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
            expect(tag & 7 == 2, f"a field of wire type {tag & 7}")
            length = varint()
            yield tag >> 3, data[at:at + length]
            at += length


def policy_keys(state):
    """From the desired state that a target proxy keeps (`DesiredState.targets.key` of proxy.proto)."""
    keys = {}
    for number, target in protobuf((state / "desired.pb").read_bytes()):
        if number == 4:
            for field, value in protobuf(target):
                if field == 3:
                    key = dict(protobuf(value))
                    keys[key[1].decode()] = key[2]
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


def segments(stream, keys):
    """By timeline, in order: (head, frames)."""
    lines = collections.defaultdict(list)
    for path in stream.glob("segments/*.seg"):
        head, frames = journal_reader.segment(path, keys)
        expect(path.name == f"{head['timeline']}-{head['segment']:016x}.seg", f"{path.name} holds {head['segment']}")
        lines[head["timeline"]].append((head, frames))
    for line in lines.values():
        line.sort(key=lambda segment: segment[0]["segment"])
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
    with workspace("formats") as folder:
        stream = stopped(folder)
        keys = policy_keys(folder / "target-state")
        tests.run("formats: the journal, read by the document, is the source's disks", journal_is_the_disk, folder, stream, keys)
        tests.run("formats: a view's delta is a timeline in the journal's format", delta_is_a_timeline, stream, keys)
        tests.run("formats: the write-intent logs say a clean stop", intent_logs, folder)
        tests.run("formats: a flipped bit is found", damage_is_seen, stream, keys)
    tests.end()


if __name__ == "__main__":
    main()
