#!/usr/bin/python3
"""Real machines on protected disks: Linux guests in QEMU, as `tests/guest` makes them.

Needs qemu-system-x86, qemu-utils, busybox-static, zstd, e2fsprogs, dmsetup, fio and the libnbd tools; `tests/all guests`
installs them. Arguments: parts of names of the tests to run.
"""

import os
import random
import shutil
import subprocess
import sys
import time
import urllib.parse

from cluster import MIB, Cluster, Failed, Tests, eventually, expect, workspace
from guest import Guest, Image
from guest.load import Work

# A write cache is there, so a guest sends flushes. All that is written is read back and compared.
VERIFY = "fio --name=v --directory={} --size=8M --rw=randwrite --bs=4k --iodepth=16 --ioengine=libaio --direct=1 " \
         "--fsync=32 --verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=terse"


def blank(path, size):
    with open(path, "wb") as out:
        out.truncate(size)
    return path


def laboratory(folder, image):
    """The guests themselves, on disks of QEMU's own: what fails here is not the product's fault."""
    path = folder / "peer.sock"
    peer = subprocess.Popen(["qemu-storage-daemon", "--blockdev",
                             f"driver=file,node-name=peer,filename={blank(folder / 'peer.img', 64 * MIB)}", "--export",
                             f"type=vhost-user-blk,id=peer,node-name=peer,addr.type=unix,addr.path={path},writable=on"])
    guest = Guest(folder, image, "laboratory", tools=True)
    guest.file("own", blank(folder / "own.img", 64 * MIB))
    guest.vhost_user("peer", path, reconnect=0)
    try:
        eventually("the peer listens", path.exists)
        guest.boot()
        for name in ("own", "peer"):
            expect(guest.queue(name, "write_cache") == "write back", f"{name}: a guest that sends no flush")
            guest.do(f"mkfs.ext4 -q {guest.block(name)}; mkdir /mnt/{name}; mount {guest.block(name)} /mnt/{name}")
            guest.do(VERIFY.format(f"/mnt/{name}"))
        guest.load("ublk_drv")
        guest.do("[ -c /dev/ublk-control ]")
        expect(guest.complaints() == "", guest.complaints())
        guest.shutdown()
        expect(guest.process.returncode == 0, "the guest did not switch itself off")
    finally:
        guest.close()
        peer.kill()
        peer.wait()


class Nbd:
    """Guests whose disks QEMU reaches over NBD; it waits for a server that comes back."""

    source_args = target_args = ()

    def __init__(self, folder):
        pass

    @staticmethod
    def attach(guest, name, uri, options=""):
        parts = urllib.parse.urlsplit(uri)
        guest.nbd(name, urllib.parse.parse_qs(parts.query)["socket"][0], parts.path.removeprefix("/"), options=options)

    scheme = "nbd+unix:"


class VhostUser:
    """Guests whose disks are the proxy's own, by shared memory."""

    scheme = "vhost-user:"

    def __init__(self, folder):
        for side in ("source", "target"):
            (folder / f"{side}-vhost").mkdir()
        self.source_args = ("--vhost-user", folder / "source-vhost")
        self.target_args = ("--view-vhost-user", folder / "target-vhost")

    def attach(self, guest, name, uri, options=""):
        guest.vhost_user(name, uri.removeprefix(self.scheme), options=options)


def uri(cluster, disk, front):
    """Where a guest finds a disk of the source."""
    return eventually(f"disk {disk} is on offer by {front.scheme}", lambda: next(
        (u for entry in cluster.status()["disks"] if entry["disk"] == disk for u in entry["uris"] if u.startswith(front.scheme)), None))


def fail_over(cluster, *options, to="latest"):
    """Fails the group over; URIs of its view by disk."""
    done = cluster.command("failover", "start", Cluster.GROUP, "--to", to, *options, timeout=180)
    expect(done["state"] == "done", f"the failover: {done}")
    return {export["disk"]: export["uris"] for export in done["result"]["view"]["exports"]}


def survive(folder, image, kind):
    """A guest runs from a protected disk and works on another while source and target are killed; its power is cut; the
    group fails over; the replica boots, clean, and has all that was synced."""
    front = kind(folder)
    shutil.copy(image.root, folder / "root.img")
    cluster = guest = replica = None
    try:
        cluster = Cluster(folder, {"root": 0, "data": 160 * MIB}, images={"root": folder / "root.img"},
                          source_args=front.source_args, target_args=front.target_args)
        guest = Guest(folder, image, "machine", tools=True)
        for disk in ("root", "data"):
            front.attach(guest, disk, uri(cluster, disk, front))
        guest.boot(root="root")
        for disk in ("root", "data"):
            expect(guest.queue(disk, "write_cache") == "write back", f"{disk}: a guest that sends no flush")
        guest.do(f"mkfs.ext4 -q {guest.block('data')}; mkdir /mnt/data; mount {guest.block('data')} /mnt/data")
        guest.do(VERIFY.format("/mnt/data"), timeout=180)

        work = Work(guest, "/mnt/data")
        work.progress()
        for _ in range(2):
            time.sleep(random.uniform(0.2, 1.0))
            cluster.source.kill()
            # A guest that waits sees nothing of it.
            time.sleep(1.5)
            cluster.source.start()
            work.progress()
        # What was read and written across another death, each block compared.
        guest.start("verify", VERIFY.format("/mnt/data") + " --verify_backlog=64 --name=across --size=6M")
        time.sleep(4)
        cluster.source.kill()
        time.sleep(0.5)
        cluster.source.start()
        code, output = guest.finished("verify", timeout=240)
        expect(code == 0, f"fio across a restart: {output[-1500:]}")
        work.progress()

        cluster.target.kill()
        work.progress(20)
        cluster.target.start()
        work.progress()
        expect(guest.complaints() == "", f"the guest has seen errors: {guest.complaints()}")

        time.sleep(random.uniform(0.1, 1.0))
        stall = work.stall()
        guest.power_cut()
        cluster.settle()
        view = fail_over(cluster)
        replica = Guest(folder, image, "replica")
        for disk in ("root", "data"):
            front.attach(replica, disk, next(u for u in view[disk] if u.startswith(front.scheme)))
        replica.boot(root="root")
        data = replica.block("data")
        # The first run replays the journal, as after each power cut; then nothing is left to mend.
        replica.do(f"e2fsck -p {data} || [ $? -eq 1 ]; e2fsck -fn {data}", timeout=180)
        replica.do(f"mount {data} /mnt/data")
        files = work.check(replica, "/mnt/data")
        replica.do("echo on >/mnt/data/on; sync /mnt/data/on")
        expect(replica.complaints() == "", f"the replica has seen errors: {replica.complaints()}")
        replica.shutdown()
        print(f"{files} files and {work.count() - files} slots synced, longest stall {stall:.1f} s")
    finally:
        for machine in (replica, guest):
            if machine:
                machine.close()
        if cluster:
            cluster.close()


TESTS = {
    "laboratory": laboratory,
    "survive by nbd": lambda folder, image: survive(folder, image, Nbd),
}


def main():
    os.environ.setdefault("LC_ALL", "C")
    chosen = {name: test for name, test in TESTS.items() if not sys.argv[1:] or any(a in name for a in sys.argv[1:])}
    tests = Tests()
    image = Image()
    for name, test in chosen.items():
        with workspace(name.replace(" ", "-")) as folder:
            tests.run(f"guests: {name}", test, folder, image)
    tests.end()


if __name__ == "__main__":
    main()
