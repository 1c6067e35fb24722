"""A machine that protects its own disk: the source proxy runs in the guest and gives it back to it as a ublk device.

Coordinator and target run on this host, which the guest reaches at 10.0.2.2. The proxy is started by the commands of its
systemd unit, as they stand there.
"""

import hashlib
import json
import re

from cluster import AFTERIMAGE, MIB, ROOT, Cluster, Failed, digest, eventually, expect, free_port

from .load import Work
from .machine import HOST, Guest, Lost

DEVICE = "/dev/ublkb0"
LINK = f"/dev/afterimage/{Cluster.GROUP}/data"
STATE = "/var/tmp/source"
CONFIG = "/etc/afterimage/proxy.toml"
# What the guest calls the host: the proxy looks the name up.
NAME = "coordinator.lab"


def product(guest):
    """The product is where the unit looks for it, and where a shell does."""
    guest.files.program(AFTERIMAGE, at="usr/bin/afterimage")
    guest.files.link("bin/afterimage", "/usr/bin/afterimage")


def unit():
    """What the unit of the proxy runs: commands before, of which those with a dash may fail, and the proxy."""
    text = (ROOT / "tools" / "systemd" / "afterimage-proxy.service").read_text()
    before = [c[1:] + " || true" if c.startswith("-") else c for c in re.findall(r"^ExecStartPre=(.*)$", text, re.M)]
    (command,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    return "\n".join(before), command


class Inside:
    """A disk that only the guest has."""

    def __init__(self, path):
        self.path = path

    def exists(self):
        return True

    def __str__(self):
        return self.path


class Proxy:
    """A proxy of the product in a guest, as `cluster.Process` is one here."""

    def __init__(self, guest, name, config, token=""):
        self.guest, self.name, self.token = guest, name, token
        guest.do(f"mkdir -p /etc/afterimage; echo '{HOST} {NAME}' >/etc/hosts; cat >{CONFIG} <<'END'\n{config}\nEND")
        self.lives = 0
        self.start()

    def start(self):
        self.lives += 1
        before, command = unit()
        self.guest.do(f"export AFTERIMAGE_TOKEN={self.token}\n{before}\n"
                      f"setsid sh -c 'echo $$ >/tmp/{self.name}.pid; exec {command}' >>/tmp/{self.name}.log 2>&1 </dev/null &\n"
                      f"until [ -s /tmp/{self.name}.pid ]; do usleep 10000; done")

    def alive(self):
        return self.guest.run(f"kill -0 $(cat /tmp/{self.name}.pid)")[0] == 0

    def ready(self, timeout=90):
        eventually("the proxy in the guest is ready", lambda: self.check() and
                   int(self.guest.run(f"grep -c ' ready ' /tmp/{self.name}.log")[1] or 0) >= self.lives, timeout)

    def check(self):
        if not self.alive():
            raise Failed(f"{self.name} in the guest has ended:\n{self.tail()}")
        return True

    def tail(self, lines=40):
        return self.guest.run(f"tail -n {lines} /tmp/{self.name}.log")[1]

    def _end(self, signal):
        self.guest.do(f"pid=$(cat /tmp/{self.name}.pid); rm /tmp/{self.name}.pid; kill -{signal} $pid\n"
                      "for try in $(seq 600); do kill -0 $pid 2>/dev/null || exit 0; usleep 50000; done; exit 1", timeout=60)

    def kill(self):
        self._end("KILL")

    def stop(self):
        try:
            if self.alive():
                self._end("TERM")
        except Lost:
            pass


class Bare(Cluster):
    """A cluster whose source is in a guest; `source` is more of its settings."""

    def __init__(self, folder, guest, disks, source=""):
        self.guest, self.settings = guest, source
        port = free_port()
        super().__init__(folder, disks, stream_port=port, advertise=f"{HOST}:{port}",
                         images={name: Inside(path) for name, path in disks.items()})

    def proxy(self, name, *args, port=None):
        if name != "source":
            return super().proxy(name, *args, port=port)
        token = self.command("token", "create", name, "--role", "proxy")["token"]
        process = Proxy(self.guest, name, f"""
            name = "{name}"
            state_dir = "{STATE}"
            [coordinator]
            address = "{NAME}:{self.port}"
            [source]
            ublk = true
            memory = "64MiB"
            {self.settings}""", token=token)
        self.processes.append(process)
        return process

    def device(self, disk="data"):
        """Where the guest finds a disk."""
        def known():
            uris = [u for entry in self.status()["disks"] if entry["disk"] == disk for u in entry["uris"] if u.startswith("ublk:")]
            return uris[0].removeprefix("ublk:") if uris else None
        return eventually("the status names the device", known)


VERIFY = "fio --name={1} --directory={0} --size=6M --rw=randrw --bs=4k --iodepth=16 --ioengine=libaio --direct=1 --fsync=32 " \
         "--verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=terse"


# There is no udev in a guest that could tell LVM anything.
LVM = """
mkdir -p /etc/lvm
cat >/etc/lvm/lvm.conf <<'END'
activation { udev_sync = 0 udev_rules = 0 }
devices { obtain_device_list_from_udev = 0 use_devicesfile = 0 external_device_info_source = "none" }
global { event_activation = 0 use_lvmpolld = 0 }
backup { backup = 0 archive = 0 }
END
lvm() { /sbin/lvm "$@" 9>&- 8<&-; }
"""
# Where the first volume of a group begins on its disk.
EXTENTS = MIB


def grow(guest, cluster, disk):
    """The volume gets larger under its device. This kernel cannot tell hosts: they go on with what they know, and find the
    rest in a device that is made anew."""
    guest.do(LVM + "lvm lvextend -q -L +16M vg0/data")
    keeps = "has grown to 117440512 bytes, and /dev/ublkb0 has not"
    eventually("the proxy says that the device keeps its size", lambda: keeps in cluster.source.tail(400), 60, 0.5)
    expect(guest.do(f"blockdev --getsize64 {disk} {LINK}").split() == [str(112 * MIB), str(96 * MIB)], "the sizes after growth")
    expect("Linux 6.16" in cluster.source.tail(400), "what the kernel lacks is not named")
    eventually("what is new is protected", cluster.protected, 60)


def bare(folder, image):
    """A volume of LVM is taken under protection where it lies, used through its device while the proxy is killed and stopped,
    grows, and is taken out again; what it holds then is the replica's newest point and is read without us."""
    guest = Guest(folder, image, "bare", memory=768, net=True, tools=True)
    product(guest)
    guest.files.program("/sbin/lvm", at="sbin/lvm")
    raw = folder / "data.img"
    with open(raw, "wb") as out:
        out.truncate(128 * MIB)
    guest.file("data", raw)
    cluster = None
    try:
        guest.boot()
        code, said = guest.run("afterimage proxy --serve d=/dev/null --ublk; exit $?")
        expect(code == 2 and "ublk_drv" in said, f"a kernel without ublk is not named: {code} {said}")
        guest.load("ublk_drv")
        guest.load("dm_flakey")  # and so device mapper
        disk = "/dev/vg0/data"
        guest.do(LVM + f"lvm pvcreate -q {guest.block('data')}; lvm vgcreate -q vg0 {guest.block('data')}; "
                 "lvm lvcreate -q -L 96M -n data vg0")
        # It has a file system with data already: protection changes nothing of it.
        guest.do(f"mkfs.ext4 -q {disk} 80M; mount {disk} /mnt; mkdir /mnt/before; seq 100000 >/mnt/before/numbers; umount /mnt")
        cluster = Bare(folder, guest, {"data": disk})
        expect(cluster.device() == DEVICE, f"the device is {cluster.device()}")
        name = DEVICE.removeprefix("/dev/")
        for what, value in (("write_cache", "write back"), ("fua", "1"), ("logical_block_size", "512")):
            found = guest.do(f"cat /sys/block/{name}/queue/{what}")
            expect(found == value, f"{what} is {found}, not {value}")
        expect(guest.do(f"blockdev --getsize64 {LINK}") == str(96 * MIB), "the size of the device")
        # Nobody else gets at the disk meanwhile.
        expect(guest.run(f"mount {disk} /mnt")[0] != 0, "the disk itself can be mounted beside the proxy")
        # Behind the file system: zeroes and holes where there was data.
        guest.do(f"yes | dd of={LINK} bs=1M seek=84 count=8 iflag=fullblock oflag=direct conv=notrunc 2>/dev/null\n"
                 f"/sbin/blkdiscard -z -o 85M -l 1M {LINK}; /sbin/blkdiscard -o 87M -l 1M {LINK}\n"
                 f"for at in 85 87; do dd if={LINK} bs=1M skip=$at count=1 iflag=direct 2>/dev/null | tr -d '\\0' | cmp - /dev/null; done\n"
                 f"yes | head -c 1048576 >/tmp/yes; dd if={LINK} bs=1M skip=86 count=1 iflag=direct 2>/dev/null | cmp - /tmp/yes")
        guest.do(f"mount {LINK} /mnt; seq 100000 | cmp - /mnt/before/numbers")
        guest.do(VERIFY.format("/mnt", "first"), timeout=240)

        work = Work(guest, "/mnt")
        work.progress()
        for _ in range(2):
            cluster.source.kill()
            cluster.source.start()
            work.progress(timeout=120)
        guest.start("across", VERIFY.format("/mnt", "across"))
        cluster.source.kill()
        cluster.source.start()
        code, output = guest.finished("across", timeout=300)
        expect(code == 0, f"fio across a death of the proxy: {output[-1500:]}")
        grow(guest, cluster, disk)
        work.progress()
        # A clean stop leaves the device to the next process, too.
        cluster.source.stop()
        waiting = json.loads(guest.do("afterimage ublk list --json"))["devices"]
        expect([d["state"] for d in waiting] == ["waiting"] and waiting[0]["links"] == [LINK], f"after a stop: {waiting}")
        cluster.source.start()
        work.progress(timeout=120)
        expect(guest.complaints() == "", f"the guest has seen errors: {guest.complaints()}")

        guest.do("for p in /proc/[0-9]*; do case $(readlink $p/cwd || true) in /mnt*) kill -9 ${p#/proc/};; esac; done; sleep 1")

        def delete():
            return cluster.command("group", "delete", Cluster.GROUP, timeout=120)
        try:
            delete()
            raise AssertionError("a mounted device can be ended")
        except Failed as error:
            expect("unmount it first" in str(error), f"a mounted device: {error}")
        guest.do(f"umount /mnt; sync; blockdev --flushbufs {LINK}")
        # Made anew, it has the size of the volume.
        cluster.source.stop()
        guest.do(f"afterimage ublk remove {LINK}")
        cluster.source.start()
        eventually("the device is there again", lambda: guest.run(f"[ -b {LINK} ]")[0] == 0, 60, 0.5)
        eventually("with what is new", lambda: guest.run(f"blockdev --getsize64 {LINK}")[1] == str(112 * MIB), 60, 0.5)
        guest.do(f"yes new | dd of={LINK} bs=1M seek=104 count=4 iflag=fullblock oflag=direct conv=notrunc 2>/dev/null")
        cluster.settle()
        view = cluster.open_view("check")
        with open(raw, "rb") as whole:
            whole.seek(EXTENTS)
            theirs = hashlib.sha256(whole.read(112 * MIB)).hexdigest().encode()
        expect(digest(view["data"]) == theirs, "the newest point is not what the disk holds")
        cluster.close_view("check")

        # Out again: the device is gone, and the disk is what it was.
        delete()
        expect(guest.run(f"[ -e {DEVICE} ] || [ -e {LINK} ]")[0] != 0, "the device is still there")
        guest.do(f"e2fsck -fn {disk}; mount {disk} /mnt; seq 100000 | cmp - /mnt/before/numbers", timeout=180)
        files = work.check(guest, "/mnt")
        guest.do("umount /mnt")
        cluster.source.stop()
        guest.do(LVM + "lvm vgchange -q -an vg0; rmmod ublk_drv")
        expect(guest.complaints() == "", f"the guest has seen errors: {guest.complaints()}")
        print(f"{files} files synced across 4 ends of the proxy, longest stall {work.stall():.1f} s")
    except Failed as error:
        if cluster and guest.alive():
            raise Failed(f"{error}\n--- the proxy in the guest:\n{cluster.source.tail()}") from error
        raise
    finally:
        if cluster:
            cluster.close()
        guest.close()


PAIR = """
mkdir -p /var/tmp/j
afterimage proxy --new-pair /tmp/pair --serve d={disk} --listen 127.0.0.1:7800
replica() {{ exec afterimage proxy --standalone /tmp/pair/target.toml --journal /var/tmp/j --listen 127.0.0.1:7800 --memory 64MiB "$@"; }}
machine() {{ exec afterimage proxy --standalone /tmp/pair/source.toml --state /tmp/source-state --memory 64MiB --ublk; }}
waited() {{ for try in $(seq 1200); do "$@" && return; usleep 50000; done; cat /tmp/*.log; exit 1; }}
"""


def views(folder, image):
    """A view of a protected disk is a block device, too: read-only it shows the point, and takes no write; over a restart
    of its proxy it is the same."""
    guest = Guest(folder, image, "views", memory=1024)
    product(guest)
    raw = folder / "data.img"
    with open(raw, "wb") as out:
        out.truncate(48 * MIB)
    guest.file("data", raw)
    try:
        guest.boot()
        guest.load("ublk_drv")
        pair = PAIR.format(disk=guest.block("data"))
        # The newest complete point is of a time when the target knew of no view.
        guest.do(pair + """
            replica >/tmp/t.log 2>&1 </dev/null & target=$!
            machine >/tmp/s.log 2>&1 </dev/null & source=$!
            waited [ -e /dev/afterimage/d ]
            mkfs.ext4 -q /dev/afterimage/d; mount /dev/afterimage/d /mnt; seq 50000 >/mnt/numbers; sync
            waited grep -q protected /tmp/s.log
            sync; sleep 4; umount /mnt; sleep 4
            kill $source; wait $source || true; kill $target; wait $target || true
            # A device that nobody serves is ended by name.
            afterimage ublk list --json | grep -q '"state":"waiting"'
            afterimage ublk remove /dev/afterimage/d
            [ ! -e /dev/ublkb0 ]""", timeout=240)
        guest.do(pair.replace("afterimage proxy --new-pair", ": ") + """
            printf '[[target.views]]\\nname = "v"\\n' >>/tmp/pair/target.toml
            for life in 1 2; do
                replica --view-ublk >/tmp/t$life.log 2>&1 </dev/null & target=$!
                waited grep -q "ublkb0 \\(is there\\|goes on\\)" /tmp/t$life.log
                if [ $life = 1 ]; then
                    [ $(cat /sys/block/ublkb0/ro) = 1 ]
                    if dd if=/dev/zero of=/dev/ublkb0 bs=4096 count=1 oflag=direct 2>/dev/null; then exit 1; fi
                    mount -o ro,noload /dev/afterimage-views/v/d /mnt
                fi
                seq 50000 | cmp - /mnt/numbers
                echo 3 >/proc/sys/vm/drop_caches
                [ $life = 2 ] || kill -9 $target; [ $life = 2 ] || wait $target || true
            done
            seq 50000 | cmp - /mnt/numbers
            umount /mnt
            kill $target; wait $target || true""", timeout=240)
        expect(guest.complaints() == "", f"the guest has seen errors: {guest.complaints()}")
    finally:
        guest.close()


# As the rules of udev in tools/systemd do it, which has no place in a guest: a device belongs to who has made it.
RULES = """
chmod 666 /dev/ublk-control
(set +e
while :; do
    for d in /dev/ublkc* /dev/ublkb*; do
        [ -e $d ] && owner=$(/usr/bin/afterimage ublk owner ${d##*/} 2>/dev/null) && chown ${owner% *}:${owner#* } $d
    done
    usleep 100000
done) >/dev/null 2>&1 </dev/null &
"""
USER = """
user() { su -s /bin/sh lab -c "PATH=$PATH; $*"; }
serve() { user "exec afterimage proxy --serve d=/var/tmp/lab/disk $*" >>/tmp/lab.log 2>&1 </dev/null & }
waited() { for try in $(seq 1200); do "$@" && return; usleep 50000; done; cat /tmp/lab.log; exit 1; }
pid() { ps -o pid,args | awk '/[a]fterimage proxy --serve/ { print $1 }'; }
ended() { [ -z "$(pid)" ]; }
"""


def ordinary_user(folder, image):
    """Who is not root has devices, too, whose data the kernel copies: they end with their proxy, and the disk has what was
    written."""
    guest = Guest(folder, image, "user", memory=512, tools=True)
    product(guest)
    guest.files.program("/sbin/lvm", at="sbin/lvm")
    try:
        guest.boot()
        guest.load("ublk_drv")
        guest.load("dm_flakey")
        guest.do("mkdir -p /etc; printf 'root:x:0:0::/:/bin/sh\\nlab:x:1000:1000::/var/tmp/lab:/bin/sh\\n' >/etc/passwd; echo 'lab:x:1000:' >/etc/group; chmod 755 /\n"
                 "mkdir /var/tmp/lab; truncate -s 48M /var/tmp/lab/disk; chown -R 1000:1000 /var/tmp/lab")
        code, said = guest.run(USER + "user 'afterimage proxy --serve d=/var/tmp/lab/disk --ublk'")
        expect(code == 2 and "ublk-control" in said, f"what a user lacks is not said: {code} {said}")
        guest.do("chmod 666 /dev/ublk-control")
        code, said = guest.run(USER + "user 'afterimage proxy --serve d=/var/tmp/lab/disk --ublk'")
        expect(code == 2 and "unprivileged" in said, f"what a user may do is not said: {code} {said}")
        guest.do(RULES + USER + """
            serve --ublk=unprivileged
            waited grep -q 'ublkb0 is there' /tmp/lab.log
            [ $(stat -c %U /proc/$(pid)) = lab ]
            waited user '[ -w /dev/ublkb0 ]'
            [ "$(/usr/bin/afterimage ublk owner /dev/ublkc0)" = "1000 1000" ]
            [ $(cat /sys/block/ublkb0/queue/fua) = 1 ]; [ $(blockdev --getsize64 /dev/ublkb0) = 50331648 ]""", timeout=180)
        # By the user, past the cache: all sizes, read back and compared.
        guest.do(USER + """
            cd /tmp
            user "env LD_LIBRARY_PATH=$LD_LIBRARY_PATH fio --name=v --filename=/dev/ublkb0 --size=6M --rw=randwrite --bsrange=4k-512k \\
                --blockalign=4k --iodepth=24 --ioengine=libaio --direct=1 --fsync=32 --verify=crc32c --do_verify=1 --verify_fatal=1 \\
                --verify_state_save=0 --output-format=terse" >/tmp/fio.out 2>&1 || { cat /tmp/fio.out; exit 1; }
            yes | dd of=/dev/ublkb0 bs=1M seek=20 count=4 iflag=fullblock oflag=direct 2>/dev/null
            /sbin/blkdiscard -z -o 21M -l 1M /dev/ublkb0; /sbin/blkdiscard -o 23M -l 1M /dev/ublkb0
            for at in 21 23; do dd if=/dev/ublkb0 bs=1M skip=$at count=1 iflag=direct 2>/dev/null | tr -d '\\0' | cmp - /dev/null; done
            yes | head -c 1048576 >/tmp/z; dd if=/dev/ublkb0 bs=1M skip=22 count=1 iflag=direct 2>/dev/null | cmp - /tmp/z
            sync /dev/ublkb0; dd if=/dev/ublkb0 bs=1M iflag=direct 2>/dev/null | cmp - /var/tmp/lab/disk""", timeout=240)
        # LVM on top of a device; root sees and ends devices of others.
        guest.do(LVM + USER + """
            lvm pvcreate -q -y -ff /dev/ublkb0; lvm vgcreate -q top /dev/ublkb0; lvm lvcreate -q -y -Wn -L 24M -n data top
            mkfs.ext4 -q /dev/top/data; mount /dev/top/data /mnt; seq 100000 >/mnt/numbers; umount /mnt
            lvm vgchange -q -an top
            afterimage ublk list --json | grep -q '"state":"live"'
            kill -9 $(pid)
            # Without its process it is not there.
            waited sh -c '[ ! -e /dev/ublkb0 ]'
            serve --ublk=unprivileged
            waited sh -c '[ $(grep -c "ublkb0 is there" /tmp/lab.log) = 2 ]'
            lvm vgchange -q -ay top; mount -r /dev/top/data /mnt; seq 100000 | cmp - /mnt/numbers; umount /mnt
            lvm vgchange -q -an top
            kill $(pid); waited ended
            waited sh -c '[ ! -e /dev/ublkb0 ]'
            afterimage ublk list --json | grep -q '"state":"dead"'
            afterimage ublk remove /dev/ublkb0
            [ ! -e /dev/ublkc0 ]""", timeout=240)
        expect("EXT4" not in guest.complaints(), f"a file system was not well: {guest.complaints()}")
    except Failed as error:
        if guest.alive():
            raise Failed(f"{error}\n--- the proxy in the guest:\n{guest.run('tail -n 40 /tmp/lab.log')[1]}") from error
        raise
    finally:
        guest.close()
