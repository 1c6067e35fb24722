#!/usr/bin/env python3
"""Real machines on protected disks: Linux guests in QEMU, as `tests/guest` makes them.

Needs qemu-system-x86, qemu-utils, busybox-static, zstd, e2fsprogs, dmsetup, fio and the libnbd tools; `tests/all guests`
installs them. Arguments: parts of names of the tests to run.
"""

import os
import subprocess
import sys

from cluster import MIB, Tests, eventually, expect, workspace
from guest import Guest, Image

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


TESTS = {
    "laboratory": laboratory,
}


def main():
    os.environ.setdefault("LC_ALL", "C")
    chosen = {name: test for name, test in TESTS.items() if not sys.argv[1:] or any(a in name for a in sys.argv[1:])}
    tests = Tests()
    image = Image()
    for name, test in chosen.items():
        with workspace(name) as folder:
            tests.run(f"guests: {name}", test, folder, image)
    tests.end()


if __name__ == "__main__":
    main()
