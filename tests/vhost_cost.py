#!/usr/bin/python3
"""What a disk by vhost-user-blk costs: ours, unprotected and protected, beside qemu-storage-daemon's, on files of one file system.

Requests per CPU second of the server come from a driver without a machine around it (`vhost_driver`), since a guest without KVM
spends its time in QEMU: the process's own clock, all its threads, so that other programs on the host matter little. *Protected*
is a source with its target, a coordinator beside them; the CPU is the source's, and in the second figure the source's and the
target's. Latencies come from a guest, once on each disk in turn. Each figure is the median of the ratios of alternating pairs,
ours over the other's, with the lowest and the highest; also how often the unprotected proxy wakes up while nobody asks anything.

Needs what `tests/guests.py` needs. Arguments: pairs (5), seconds of each run (2), and `quick` for no guest.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

from cluster import AFTERIMAGE, MIB, Cluster, eventually, workspace
from guest import Guest, Image
from vhost_driver import READ, WRITE, Driver

SIZE = 256 * MIB
JOBS = [("4 KiB reads, depth 1", READ, 1, 4096), ("4 KiB reads, depth 32", READ, 32, 4096),
        ("4 KiB writes, depth 1", WRITE, 1, 4096), ("4 KiB writes, depth 32", WRITE, 32, 4096),
        ("64 KiB reads, depth 32", READ, 32, 65536), ("1 MiB reads, depth 32", READ, 32, MIB)]


def cpu_seconds(*pids):
    """Of all threads, also of those that have ended."""
    return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)


def sleeps(pid):
    """How often each thread has gone to sleep. Those of the kernel's own (`iou-wrk`) look every 5 s whether they are to end."""
    found = {}
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = (task / "comm").read_text().strip()
            lines = (task / "status").read_text().splitlines()
            found[name, task.name] = next(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
    return {name: count for name, count in found.items() if not name[0].startswith("iou-")}


def idle(disk, name):
    time.sleep(2)
    before = sleeps(disk.pids[0])
    time.sleep(30)
    print(f"idle for 30 s: {sum(sleeps(disk.pids[0]).values()) - sum(before.values())} wake-ups of the {name}")


def spread(ratios):
    ratios = sorted(ratios)
    return f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}–{ratios[-1]:.2f}]"


def percentile(values):
    return sorted(values)[len(values) * 99 // 100]


class Disk:
    """A socket, and the processes whose CPU its requests cost."""

    def __init__(self, name, path, *pids):
        self.name, self.path, self.pids = name, path, pids

    def load(self, kind, depth, block, seconds):
        """Requests per second of the CPU of the first process and of all, and the 99th percentile of the latency."""
        driver = Driver(self.path, depth, block)
        try:
            driver.load(kind, 0.2)
            before = cpu_seconds(*self.pids[:1]), cpu_seconds(*self.pids)
            count, took = driver.load(kind, seconds)
            return count / (cpu_seconds(*self.pids[:1]) - before[0]), count / (cpu_seconds(*self.pids) - before[1]), percentile(took)
        finally:
            driver.close()


def compare(ours, peer, pairs, seconds):
    for name, kind, depth, block in JOBS:
        ratios = []
        for number in range(pairs):
            turn = [ours, peer] if number % 2 == 0 else [peer, ours]
            found = {disk.name: disk.load(kind, depth, block, seconds) for disk in turn}
            ratios.append([found[ours.name][at] / found[peer.name][at] for at in range(3)])
        one, all_of_them, late = zip(*ratios)
        both = f", with the target {spread(all_of_them)}" if len(ours.pids) > 1 else ""
        print(f"{ours.name}, {name}: requests per CPU second {spread(one)}{both}; 99th percentile {spread(late)}", flush=True)


def latencies(folder, disks, pairs, seconds):
    """In one guest: the 99th percentile of fio's latencies, each disk's over that of the first."""
    guest = Guest(folder, Image(), "cost", tools=True)
    for disk in disks:
        guest.vhost_user(disk.name, disk.path, reconnect=0)
    guest.boot()
    try:
        for rw in ("randread", "randwrite"):
            ratios = {disk.name: [] for disk in disks[1:]}
            for number in range(pairs):
                found = {}
                for disk in disks if number % 2 == 0 else reversed(disks):
                    text = guest.do(f"fio --name=c --filename={guest.block(disk.name)} --rw={rw} --bs=4k --iodepth=1 --ioengine=psync "
                                    f"--direct=1 --time_based --runtime={seconds * 2} --output-format=json", timeout=120)
                    job = json.loads(text[text.index("{"):])["jobs"][0]
                    found[disk.name] = job[rw.removeprefix("rand")]["clat_ns"]["percentile"]["99.000000"]
                for name, each in ratios.items():
                    each.append(found[name] / found[disks[0].name])
            for name, each in ratios.items():
                print(f"in a guest, {rw}: 99th percentile of {name} over {disks[0].name} {spread(each)}", flush=True)
        guest.shutdown()
    finally:
        guest.close()


def fill(path):
    """On the disk, not in the page cache: what is there would be written first by whoever reads it directly."""
    with open(path, "wb") as out:
        for _ in range(SIZE // MIB):
            out.write(os.urandom(MIB))
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def main():
    quick = "quick" in sys.argv
    numbers = [int(word) for word in sys.argv[1:] if word != "quick"]
    pairs, seconds = (numbers + [5, 2][len(numbers):])[:2]
    with workspace("vhost-cost") as folder, contextlib.ExitStack() as at_end:
        def serve(*command):
            server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            at_end.callback(server.wait)
            at_end.callback(server.kill)
            return server.pid
        sockets = folder / "vhost"
        plain = Disk("unprotected", sockets / "plain.sock", serve(
            AFTERIMAGE, "proxy", "--serve", f"plain={fill(folder / 'plain.img')}", "--vhost-user", sockets))
        peer = Disk("qemu-storage-daemon", folder / "peer.sock", serve(
            "qemu-storage-daemon", "--blockdev",
            f"driver=file,node-name=peer,filename={fill(folder / 'peer.img')},cache.direct=on,aio=io_uring", "--export",
            f"type=vhost-user-blk,id=peer,node-name=peer,addr.type=unix,addr.path={folder / 'peer.sock'},writable=on"))
        for disk in (plain, peer):
            eventually("the server listens", disk.path.exists)
        compare(plain, peer, pairs, seconds)
        idle(plain, "unprotected proxy")
        fill(folder / "kept.img")
        (folder / "source-vhost").mkdir()
        cluster = Cluster(folder, {"kept": SIZE}, cut_interval="1s", source_args=("--vhost-user", folder / "source-vhost"))
        at_end.callback(cluster.close)
        uris = [uri for entry in cluster.status()["disks"] for uri in entry["uris"]]
        path = next(uri for uri in uris if uri.startswith("vhost-user:")).removeprefix("vhost-user:")
        kept = Disk("protected", pathlib.Path(path), cluster.source.process.pid, cluster.target.process.pid)
        eventually("the source listens", kept.path.exists)
        compare(kept, peer, pairs, seconds)
        idle(kept, "protected source")
        if not quick:
            latencies(folder, [plain, kept, peer], pairs, seconds)


main()
