#!/usr/bin/python3
"""Two hundred disks in one proxy, one target behind a slow link: memory stays bounded, every disk goes on, none starves.
Then many groups of which half have a link that stands still: the others keep theirs.

Pairs without a coordinator. Each disk has a client with writes under way all the time.
"""

import json
import sys
import threading
import time
import tomllib
import uuid

import nbd

from cluster import AFTERIMAGE, MIB, Process, Tests, connects, eventually, expect, free_port, run, workspace
from scene import Relay

SIZE = 16 * MIB
SECONDS = 15
DEPTH = 4
# Of the source, beside its buffers: what 200 disks and their clients need.
OTHER_MEMORY = 256 * MIB
BUFFERS = 256 * MIB


class Pair:
    """Source and target with a relay between them."""

    def __init__(self, folder, disks, groups=1):
        self.folder = folder
        self.socket = folder / "source.sock"
        port = free_port()
        self.relay = Relay(port)
        # Every second group has this one, if there are several.
        self.other = Relay(port)
        serve = []
        for name in disks:
            image = folder / f"{name}.img"
            with open(image, "wb") as file:
                file.truncate(SIZE)
            serve += ["--serve", f"{name}={image}"]
        run(AFTERIMAGE, "proxy", "--new-pair", folder / "pair", *serve, "--listen", f"127.0.0.1:{self.relay.port}")
        for end in ("source", "target"):
            split(folder / "pair" / f"{end}.toml", end, groups, f"127.0.0.1:{self.other.port}", folder)
        self.target = Process(folder, "target", "proxy", "--standalone", folder / "pair/target.toml", "--journal",
                              folder / "journal", "--listen", f"127.0.0.1:{port}")
        self.source = Process(folder, "source", "proxy", "--standalone", folder / "pair/source.toml", "--nbd",
                              f"unix:{self.socket}", "--memory", str(BUFFERS))
        eventually("the source listens", lambda: self.source.check() and connects(str(self.socket)))

    def uri(self, disk):
        return f"nbd+unix:///{disk}?socket={self.socket}"

    def memory(self):
        """Bytes of real memory that the source has."""
        with open(f"/proc/{self.source.process.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))

    def close(self):
        self.source.stop()
        self.target.stop()
        self.relay.close()
        self.other.close()


def split(path, end, groups, other, folder):
    """Makes several groups of the one in a stand-alone file, every second one by another way."""
    if groups == 1:
        return
    content = tomllib.loads(path.read_text())
    [group] = content[end]
    ids = folder / "streams.json"
    if not ids.exists():
        ids.write_text(json.dumps([str(uuid.uuid4()) for _ in range(groups)]))
    lines = ["[identity]", *(f"{key} = {json.dumps(value)}" for key, value in content["identity"].items())]
    disks = group.pop("disks")
    for number, stream in enumerate(json.loads(ids.read_text())):
        mine = {**group, "stream": stream, "name": f"group{number}"}
        if number % 2:
            mine["target_address"] = other
        lines += [f"[[{end}]]", *(f"{key} = {json.dumps(value)}" for key, value in mine.items())]
        for disk in disks[number::groups]:
            lines += [f"[[{end}.disks]]", *(f"{key} = {json.dumps(value)}" for key, value in disk.items())]
    path.write_text("\n".join(lines) + "\n")


class Load:
    """Writes to many disks from a few threads; counts what each was answered."""

    def __init__(self, pair, disks):
        self.counts = dict.fromkeys(disks, 0)
        self.slowest = dict.fromkeys(disks, 0.0)
        self.errors = []
        self.over = threading.Event()
        each = len(disks) // 4 + 1
        self.threads = [threading.Thread(target=self.write, args=(pair, disks[at:at + each]))
                        for at in range(0, len(disks), each)]
        for thread in self.threads:
            thread.start()

    def write(self, pair, disks):
        handles, flights = {}, {}
        data = nbd.Buffer.from_bytearray(bytearray(b"many disks, one slow target " * 586)[:16384])
        try:
            for disk in disks:
                handles[disk] = nbd.NBD()
                handles[disk].connect_uri(pair.uri(disk))
                flights[disk] = {}
            turn = 0
            while not self.over.is_set():
                for disk, handle in handles.items():
                    handle.poll(0)
                    for cookie, begun in list(flights[disk].items()):
                        if handle.aio_command_completed(cookie):
                            del flights[disk][cookie]
                            self.counts[disk] += 1
                            self.slowest[disk] = max(self.slowest[disk], time.monotonic() - begun)
                    while len(flights[disk]) < DEPTH:
                        turn += 1
                        flights[disk][handle.aio_pwrite(data, turn * 16384 % SIZE)] = time.monotonic()
                time.sleep(0.002)
        except nbd.Error as error:
            self.errors.append(f"{disk}: {error}")

    def end(self):
        self.over.set()
        for thread in self.threads:
            thread.join(60)


def go_on(pair, disks, what):
    """All disks are written at once, for a while."""
    load = Load(pair, disks)
    memory = 0
    begun = time.monotonic()
    while time.monotonic() - begun < SECONDS:
        time.sleep(0.5)
        memory = max(memory, pair.memory())
        pair.source.check()
    load.end()
    expect(not load.errors, "\n".join(load.errors[:5]))
    least, most = min(load.counts.values()), max(load.counts.values())
    slowest = max(load.slowest.values())
    print(f"    {what}: {sum(load.counts.values()) / SECONDS:.0f} writes/s, of a disk {least} to {most}, slowest "
          f"{slowest:.2f} s, {memory // MIB} MiB", flush=True)
    expect(least * 4 >= most, f"a disk has {least} writes, another {most}")
    expect(slowest < 5, f"a write took {slowest:.1f} s")
    expect(memory < BUFFERS + OTHER_MEMORY, f"the source has {memory // MIB} MiB")


def half_stands_still(folder):
    """Of twenty groups ten have a link on which nothing moves: they fill what they may, and no disk of any is held up."""
    disks = [f"disk{number:03}" for number in range(40)]
    pair = Pair(folder, disks, groups=20)
    try:
        go_on(pair, disks, "twenty groups")
        pair.other.rate = 1
        go_on(pair, disks, "ten of them stand still")
    finally:
        pair.close()


def main():
    tests = Tests()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    disks = [f"disk{number:03}" for number in range(count)]
    with workspace("many") as folder:
        pair = Pair(folder, disks)
        try:
            tests.run("a fast target", go_on, pair, disks, "fast")
            pair.relay.rate = MIB
            tests.run("a slow target", go_on, pair, disks, "slow")
            pair.relay.cut()
            tests.run("no target", go_on, pair, disks, "none")
            pair.relay.rate = None
            pair.relay.mend()
            tests.run("the target is back", go_on, pair, disks, "back")
        finally:
            pair.close()
    with workspace("groups") as folder:
        tests.run("half of the groups stand still", half_stands_still, folder)
    tests.end()


if __name__ == "__main__":
    main()
