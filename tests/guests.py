#!/usr/bin/python3
"""Real machines on protected disks: Linux guests in QEMU, as `tests/guest` makes them.

Needs qemu-system-x86, qemu-utils, busybox-static, zstd, e2fsprogs, dmsetup, lvm2, fio, libnbd-bin, nbd-client, python3-cryptography,
python3-lz4; `tests/all guests` installs them. Arguments: parts of names of the tests to run.
"""

import concurrent.futures
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
import urllib.parse

from cluster import AFTERIMAGE, MIB, Cluster, Served, Tests, eventually, expect, run, workspace
from guest import Guest, Image, bare, flushes
from guest.bare import Bare
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


def view_uris(cluster, name, front, *options):
    """Opens a view; URIs by disk."""
    view = cluster.command("view", "open", Cluster.GROUP, name, *options)
    return {e["disk"]: next(u for u in e["uris"] if u.startswith(front.scheme)) for e in view["exports"]}


def sums(guest, device, count):
    """A sum for each MiB of a disk, past the cache."""
    return guest.do(f"sync; echo 3 >/proc/sys/vm/drop_caches; for n in $(seq 0 {count - 1}); do "
                    f"dd if={device} bs=1M skip=$n count=1 2>/dev/null | md5sum | cut -c 1-32; done", timeout=180).split()


# What a disk may begin with: reads its second sector by the firmware and sends it to the first serial port up to a zero.
BOOT_SECTOR = bytes.fromhex("31c0 8ed8 8ec0 bb007e b80102 b90200 b600 cd13 720e be007e ac 84c0 7406 baf803 ee ebf5 f4 ebfd")
GREETING = "started from a protected disk"


def shapes(folder, image):
    """What a guest sees of a vhost-user disk is what the disk is: blocks of 512 bytes and of 4096, several queues, memory
    that comes later; what it discards and zeroes; a disk that grows; a view that refuses writes."""
    front = VhostUser(folder)
    shutil.copy(image.root, folder / "root.img")
    zeros = hashlib.md5(bytes(MIB)).hexdigest()
    (folder / "boot.img").write_bytes((BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + GREETING.encode()).ljust(4 * MIB, b"\0"))
    cluster = guest = None
    try:
        cluster = Cluster(folder, {"root": 0, "data": 32 * MIB, "boot": 0},
                          images={name: folder / f"{name}.img" for name in ("root", "boot")},
                          source_args=front.source_args, target_args=front.target_args,
                          options={"root": ",block=512", "boot": ",block=512", "data": ",block=4096,serial=lab-data"})
        first = Guest(folder, image, "firmware")
        front.attach(first, "boot", uri(cluster, "boot", front), options=",bootindex=1")
        first.boot_sector(GREETING)
        guest = Guest(folder, image, "machine", processors=2, more_memory=256)
        for disk in ("root", "data"):
            # As hypervisors attach it that say nothing of the cache: the guest may then ask, and set it.
            guest.vhost_user(disk, uri(cluster, disk, front).removeprefix(front.scheme), queues=2, wce=disk == "data")
        guest.boot(root="root")
        for disk, attribute, value in (("root", "logical_block_size", "512"), ("data", "logical_block_size", "4096"),
                                       ("root", "write_cache", "write back"), ("data", "write_cache", "write back")):
            found = guest.queue(disk, attribute)
            expect(found == value, f"{disk}: {attribute} is {found}, not {value}")
        data = guest.block("data")
        name = data.removeprefix("/dev/")
        expect(guest.do(f"cat /sys/block/{name}/serial") == "lab-data", "the serial is another")
        expect(guest.do(f"ls /sys/block/{name}/mq | wc -l") == "2", "the disk has not two queues")
        expect(int(guest.queue("data", "discard_max_bytes")) > 0, "no discard")
        expect(int(guest.queue("data", "write_zeroes_max_bytes")) > 0, "no write zeroes")

        # Discard and zeroes, by each way that the kernel has. What lies beside them stays.
        guest.do(f"dd if=/dev/urandom of={data} bs=1M count=32 conv=fsync 2>&1", timeout=180)
        before = sums(guest, data, 32)
        expect(len(set(before)) == 32, "the disk does not hold what was written")
        guest.do(f"blkdiscard -o 4M -l 4M {data}; blkdiscard -z -o 12M -l 2M {data}; "
                 f"fallocate -p -n -o 17M -l 1M {data}; fallocate -z -n -o 20M -l 1M {data}; sync {data}")
        after = sums(guest, data, 32)
        gone = {4, 5, 6, 7, 12, 13, 17, 20}
        wrong = [n for n in range(32) if after[n] != (zeros if n in gone else before[n])]
        expect(not wrong, f"after discards and zeroes these MiB are wrong: {wrong}")
        cluster.replica_is_source()

        # A file system that discards.
        guest.do(f"mkfs.ext4 -q {data}; mkdir /mnt/data; mount -o discard {data} /mnt/data; cd /mnt/data; seq 400000 >a; "
                 "dd if=/dev/urandom of=b bs=1M count=8 2>&1; sync; rm b; sync; fstrim -v .; cd /; umount /mnt/data; "
                 f"e2fsck -fn {data}", timeout=180)
        # Not while it is mounted: the guest's kernel goes on making its tables then.
        cluster.replica_is_source()
        guest.do(f"mount {data} /mnt/data; seq 400000 | cmp - /mnt/data/a")

        # Memory that is plugged in is written from and read into: all other memory is full.
        guest.plug_memory(256 * MIB)
        guest.do("for m in /sys/devices/system/memory/memory*/state; do [ $(cat $m) = online ] || echo online >$m; done")
        free = int(guest.do("awk '/MemAvailable/ { print int($2 / 1024) }' /proc/meminfo"))
        expect(free > 300, f"no more than {free} MiB are free with the memory that was plugged in")
        guest.do(f"mount -o remount,size=90% /dev/shm; yes filler | dd of=/dev/shm/fill bs=1M iflag=fullblock count={free - 120} 2>&1; "
                 "seq 900000 >/mnt/data/c; sync; echo 3 >/proc/sys/vm/drop_caches; seq 900000 | cmp - /mnt/data/c; rm /dev/shm/fill",
                 timeout=180)
        # The disk grows where it lies; the guest hears of it.
        with open(folder / "data.img", "r+b") as disk:
            disk.truncate(48 * MIB)
        eventually("the guest sees the larger disk", lambda: guest.do(f"blockdev --getsize64 {data}") == str(48 * MIB), 60, 1)
        guest.do(f"seq 200000 | dd of={data} bs=4096 seek={40 * 256} conv=notrunc,fsync 2>&1")
        eventually("what is new is protected", cluster.protected, 60)
        guest.do("umount /mnt/data")
        expect(guest.complaints() == "", guest.complaints())
        cluster.replica_is_source()

        # A view that may not be written to, plugged in.
        view = view_uris(cluster, "look", front, "--to", "latest")
        guest.plug("look", view["data"].removeprefix(front.scheme))
        look = guest.block("look")
        expect(guest.do(f"blockdev --getro {look}") == "1", "the view does not say that it is read-only")
        expect(guest.do(f"blockdev --getsize64 {look}") == str(48 * MIB), "the view has another size than the disk")
        expect(guest.run(f"dd if=/dev/zero of={look} bs=4096 count=1 conv=fsync")[0] != 0, "a write to a read-only view is taken")
        guest.do(f"mkdir /mnt/look; mount -o ro,noload {look} /mnt/look; seq 900000 | cmp - /mnt/look/c; umount /mnt/look")
        guest.unplug("look")
        cluster.close_view("look")
        guest.shutdown()
    finally:
        if guest:
            guest.close()
        if cluster:
            cluster.close()


BLOCK = 4096
PAIRS = f"""
n=0
while [ $n -lt {32 * MIB // BLOCK} ]; do
    yes "number $n" 2>/dev/null | dd bs={BLOCK} count=1 iflag=fullblock of=%s seek=$n conv=notrunc,fsync 2>/dev/null
    echo "first $n" >&9
    yes "number $n" 2>/dev/null | dd bs={BLOCK} count=1 iflag=fullblock of=%s seek=$n conv=notrunc,fsync 2>/dev/null
    echo "second $n" >&9
    n=$((n + 1))
done"""


def numbers(folder, nbd_uri):
    """How many blocks from the start hold their number; nothing may lie behind them."""
    out = folder / "view.img"
    out.unlink(missing_ok=True)
    run("nbdcopy", nbd_uri, out)
    count, data = 0, out.read_bytes()
    for n in range(len(data) // BLOCK):
        line = b"number %d\n" % n
        if data[n * BLOCK:(n + 1) * BLOCK] != (line * (BLOCK // len(line) + 1))[:BLOCK]:
            break
        count += 1
    expect(not any(data[count * BLOCK:]), f"something lies behind block {count}")
    return count


def judge_prefix(folder, cluster, least, durable):
    """After the end of the source: the newest point holds what was synced before the last wait, and no point is ahead on one
    of the disks."""
    def together(view, what):
        first, second = numbers(folder, view["first"]), numbers(folder, view["second"])
        expect(0 <= first - second <= 1, f"{what}: {first} numbers on one disk, {second} on the other")
        return first

    found = {disk: next(u for u in uris if u.startswith("nbd+unix"))
             for disk, uris in fail_over(cluster, "--unconfirmed", Cluster.GROUP).items()}
    newest = together(found, "after the failover")
    expect(newest >= least, f"{least} numbers were synced before a point that is durable, {newest} are there")
    points = cluster.command("point", "list", Cluster.GROUP, "--writes", "--limit", "600")["points"]
    seen = set()
    whole = [p["seq"] for p in points if p["seq"] <= durable and len(p["disk_uids"]) == 2]
    for point in random.sample(whole, 6):
        view = cluster.open_view(f"past{point}", f"seq:{point}")
        seen.add(together(view, f"record {point}"))
        cluster.close_view(f"past{point}")
    expect(len(seen) > 2 and max(seen) <= newest, f"the points are not of different moments: {seen}")
    print(f"{least} pairs before the last wait, {newest} after the failover, at points before {sorted(seen)}")


def synced(guest):
    return sum(line.startswith("first") for _, line in list(guest.witnessed))


def one_prefix(folder, image):
    """A machine writes to two disks, each through another front end: a number to the one, synced, then to the other. At
    each point of its history, and after a failover with the source gone in the middle, neither is more than that ahead."""
    front = VhostUser(folder)
    cluster = guest = None
    try:
        cluster = Cluster(folder, {"first": 32 * MIB, "second": 32 * MIB}, source_args=front.source_args,
                          target_args=front.target_args)
        guest = Guest(folder, image, "machine")
        Nbd.attach(guest, "first", uri(cluster, "first", Nbd))
        front.attach(guest, "second", uri(cluster, "second", front))
        guest.boot()
        guest.start("pairs", PAIRS % (guest.block("first"), guest.block("second")))
        eventually("some pairs are written", lambda: len(guest.witnessed) > 100, 120)
        cluster.source.kill()
        time.sleep(1)
        cluster.source.start()
        count = len(guest.witnessed)
        eventually("the guest goes on", lambda: len(guest.witnessed) > count + 100, 120)
        least, durable = synced(guest), cluster.settle()
        time.sleep(random.uniform(0.5, 1.5))
        cluster.source.kill()
        guest.power_cut()
        judge_prefix(folder, cluster, least, durable)
    finally:
        if guest:
            guest.close()
        if cluster:
            cluster.close()


def one_prefix_inside(folder, image):
    """The same by ublk and NBD: a machine that protects its disks itself, whose power is cut in the middle."""
    guest = Guest(folder, image, "machine", memory=512, net=True)
    bare.product(guest)
    guest.files.program("/usr/sbin/nbd-client", at="bin/nbd-client")
    for disk in ("first", "second"):
        guest.file(disk, blank(folder / f"{disk}.img", 32 * MIB))
    cluster = None
    try:
        guest.boot()
        for module in ("ublk_drv", "nbd"):
            guest.load(module)
        cluster = Bare(folder, guest, {disk: guest.block(disk) for disk in ("first", "second")},
                       source='nbd = ["tcp:127.0.0.1:10809"]')
        guest.do(f"nbd-client -N {Cluster.GROUP}/second 127.0.0.1 10809 /dev/nbd0 2>&1", timeout=60)
        guest.start("pairs", PAIRS % (cluster.device("first"), "/dev/nbd0"))
        eventually("some pairs are written", lambda: len(guest.witnessed) > 80, 120)
        least, durable = synced(guest), cluster.settle()
        time.sleep(random.uniform(0.5, 1.5))
        expect(guest.complaints() == "", guest.complaints())
        guest.power_cut()
        judge_prefix(folder, cluster, least, durable)
    finally:
        if cluster:
            cluster.close()
        guest.close()


def flush_points(folder, image, kind):
    """What the device held at each flush, by the kernel's own log of writes, is a restore point."""
    cluster = guest = None
    try:
        guest = Guest(folder, image, "machine", memory=768 if kind is None else 384, net=kind is None, tools=True)
        if kind is None:
            # A machine that protects its own disk.
            bare.product(guest)
            guest.file("data", blank(folder / "data.img", 32 * MIB))
        else:
            front = kind(folder)
            cluster = Cluster(folder, {"data": 32 * MIB}, source_args=front.source_args, target_args=front.target_args)
            front.attach(guest, "data", uri(cluster, "data", front))
        guest.file("log", blank(folder / "log.img", 64 * MIB))
        guest.boot()
        guest.load("dm_log_writes")
        if kind is None:
            guest.load("ublk_drv")
            cluster = Bare(folder, guest, {"data": guest.block("data")})
        disk = guest.block("data") if kind else cluster.device()
        guest.do(flushes.script(disk, guest.block("log")), timeout=240)
        expect(guest.complaints() == "", guest.complaints())
        if kind is not None:
            guest.shutdown()
        cluster.settle()
        # A proxy in the guest is stopped by this, too.
        cluster.close()
        found, writes, records = flushes.compare(folder / "log.img", folder)
        print(f"{found} flushes among {writes} writes, all found in {records} records")
        expect(found > 50 and writes > 300, "too little was written")
    finally:
        if cluster:
            cluster.close()
        if guest:
            guest.close()


def kernel_client(folder, image):
    """Linux's own client of NBD, over two connections: what it sees of the disk, a file system, discards, zeroes; what it has
    synced is in the image."""
    guest = None
    served = Served(folder, "disk", 64 * MIB)
    try:
        guest = Guest(folder, image, "kernel", net=True)
        guest.files.program("/usr/sbin/nbd-client", at="bin/nbd-client")
        guest.boot()
        guest.load("nbd")
        guest.do(f"nbd-client -N disk 10.0.2.2 {served.port} /dev/nbd0 -C 2 2>&1", timeout=60)
        expect(guest.do("blockdev --getsize64 /dev/nbd0") == str(64 * MIB), "another size")
        for attribute, value in (("write_cache", "write back"), ("fua", "1"), ("logical_block_size", "512")):
            found = guest.do(f"cat /sys/block/nbd0/queue/{attribute}")
            expect(found == value, f"{attribute} is {found}, not {value}")
        for attribute in ("discard_max_bytes", "write_zeroes_max_bytes"):
            expect(int(guest.do(f"cat /sys/block/nbd0/queue/{attribute}")) > 0, f"no {attribute}")
        guest.do("mkfs.ext4 -q /dev/nbd0 40M; mkdir /mnt/n; mount -o discard /dev/nbd0 /mnt/n; seq 300000 >/mnt/n/a; sync; "
                 "seq 500000 >/mnt/n/b; sync; rm /mnt/n/b; fstrim /mnt/n; umount /mnt/n; e2fsck -fn /dev/nbd0", timeout=180)
        guest.do("yes pattern | dd of=/dev/nbd0 bs=1M seek=44 count=12 iflag=fullblock conv=fsync 2>&1; "
                 "fallocate -z -n -o 45M -l 1M /dev/nbd0; fallocate -p -n -o 47M -l 1M /dev/nbd0; "
                 "dd if=/dev/zero of=/dev/nbd0 bs=512 seek=98765 count=33 conv=fsync 2>&1; "
                 "blkdiscard -f -o 54M -l 2M /dev/nbd0; sync /dev/nbd0")
        guest.do("echo 3 >/proc/sys/vm/drop_caches; mount -o ro /dev/nbd0 /mnt/n; seq 300000 | cmp - /mnt/n/a; umount /mnt/n; "
                 "nbd-client -d /dev/nbd0 2>&1")
        expect(guest.complaints() == "", guest.complaints())
        guest.shutdown()
        wanted = bytearray(b"pattern\n" * (12 * MIB // 8))
        for at, length in ((MIB, MIB), (3 * MIB, MIB), (98765 * 512 - 44 * MIB, 33 * 512), (10 * MIB, 2 * MIB)):
            wanted[at:at + length] = bytes(length)
        with open(served.image, "rb") as disk:
            disk.seek(44 * MIB)
            expect(disk.read(12 * MIB) == wanted, "the image does not hold what was written and zeroed")
        served.process.check()
    finally:
        if guest:
            guest.close()
        served.close()


TESTS = {
    "laboratory": laboratory,
    "bare metal by ublk": bare.bare,
    "views by ublk": bare.views,
    "ublk of an ordinary user": bare.ordinary_user,
    "survive by nbd": lambda folder, image: survive(folder, image, Nbd),
    "survive by vhost-user": lambda folder, image: survive(folder, image, VhostUser),
    "shapes of disks": shapes,
    "flush points by nbd": lambda folder, image: flush_points(folder, image, Nbd),
    "flush points by vhost-user": lambda folder, image: flush_points(folder, image, VhostUser),
    "flush points by ublk": lambda folder, image: flush_points(folder, image, None),
    "one prefix by two front ends": one_prefix,
    "one prefix by ublk and nbd": one_prefix_inside,
    "the kernel's own client of NBD": kernel_client,
}


def main():
    os.environ.setdefault("LC_ALL", "C")
    chosen = {name: test for name, test in TESTS.items() if not sys.argv[1:] or any(a in name for a in sys.argv[1:])}
    tests = Tests()
    image = Image()

    def one(name):
        with workspace("guest") as folder:
            tests.run(f"guests: {name}", chosen[name], folder, image)
    # A guest has one processor to run on, and waits for its disks now and then.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(one, chosen))
    tests.end()


if __name__ == "__main__":
    main()
