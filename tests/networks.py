#!/usr/bin/python3
"""Networks of machines, with real guests of QEMU's, in a network namespace that this test makes itself: a replica is put into the
bridge that the target's map says and is told its addresses there, a test is in a bridge that nobody else reaches, and what comes
home has its own network and its own addresses again.

Needs root; iproute2, util-linux; libnbd-bin, python3-libnbd, qemu-system-x86, busybox-static, zstd, e2fsprogs (see tests/guest).
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

from cluster import MIB, Cluster, Failed, Tests, eventually, expect, free_port, run, workspace
from machines import fails, states

MAC = "52:54:00:aa:bb:07"
HERE, THERE = "192.0.2.7", "198.51.100.7"
# As cloud-init does it: what a seed with another id says is kept on the disk, and is what the guest is addressed by from then on.
INIT = """#!/bin/busybox sh
export PATH=/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for name in virtio_blk virtio_net vfat nls_cp437 nls_ascii; do
    for module in $(cat /modules/$name.order); do [ -d /sys/module/$module ] || insmod /modules/$module.ko; done
done
for try in $(seq 200); do [ -b /dev/vda ] && break; usleep 50000; done
mkdir -p /mnt/d /mnt/s
mount -t ext4 /dev/vda /mnt/d
if [ -b /dev/vdb ] && mount -t vfat -o ro,iocharset=ascii /dev/vdb /mnt/s; then
    [ "$(dd if=/dev/vdb bs=1 skip=43 count=6 2>/dev/null)" = CIDATA ] || echo "no label" >/dev/ttyS0
    if ! cmp -s /mnt/s/meta-data /mnt/d/meta-data; then
        cp /mnt/s/meta-data /mnt/s/network-config /mnt/d/
        echo "told anew: $(cat /mnt/s/meta-data)" >/dev/ttyS0
    fi
    umount /mnt/s
fi
value() { sed -n "/$1/{n;s/.*\\"\\(.*\\)\\".*/\\1/p}" /mnt/d/network-config | head -n 1; }
mac=$(sed -n 's/.*macaddress: "\\(.*\\)"/\\1/p' /mnt/d/network-config)
for link in /sys/class/net/*; do [ "$(cat $link/address)" = "$mac" ] && card=${link##*/}; done
address=$(value addresses:) gateway=$(value 'to:')
ip link set lo up; ip addr add $address dev $card; ip link set $card up; ip route add default via $gateway
sync
httpd -p 80 -h /mnt/d
reaches=no; ping -c 1 -W 2 $gateway >/dev/null 2>&1 && reaches=yes
echo "answers as $address, reaches its router: $reaches." >/dev/ttyS0
while true; do n=$((n + 1)); echo $n >/mnt/d/count; sync; usleep 200000; done
"""


def links():
    """The names of all interfaces of this namespace."""
    return {link["ifname"] for link in json.loads(run("ip", "-json", "link", "show"))}


def ours():
    """What a proxy has made."""
    return {name for name in links() if name.startswith("ai")}


def bridge(name, address):
    run("ip", "link", "add", "name", name, "type", "bridge")
    run("ip", "addr", "add", address, "dev", name)
    run("ip", "link", "set", "dev", name, "up")


def token(address, timeout=2):
    """What a guest's web server says."""
    with socket.create_connection((address, 80), timeout=timeout) as link:
        link.settimeout(timeout)
        link.sendall(b"GET /token HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: link.recv(4096), b"")).decode().rpartition("\r\n")[2].strip()


def answers(address):
    try:
        return token(address)
    except OSError:
        return None


def seen(bridge_name):
    """A frame of the guest's has come into this bridge."""
    return MAC in run("bridge", "fdb", "show", "br", bridge_name).decode()


class Probe:
    """A host in a bridge, in a namespace of its own."""

    def __init__(self, bridge_name):
        self.process = subprocess.Popen(["unshare", "--net", "sleep", "300"])
        pid = str(self.process.pid)
        self.enter = ["nsenter", "-t", pid, "-n"]
        inode = os.stat("/proc/self/ns/net").st_ino
        eventually("the namespace is there", lambda: os.stat(f"/proc/{pid}/ns/net").st_ino != inode)
        run("ip", "link", "add", "probe0", "type", "veth", "peer", "name", "probe1", "netns", pid)
        run("ip", "link", "set", "probe0", "master", bridge_name)
        run("ip", "link", "set", "probe0", "up")
        run(*self.enter, "ip", "addr", "add", "198.51.100.200/24", "dev", "probe1")
        run(*self.enter, "ip", "link", "set", "probe1", "up")

    def pings(self, address):
        done = subprocess.run([*self.enter, "busybox", "ping", "-c", "1", "-W", "2", address], capture_output=True, check=False,
                              timeout=20)
        return done.returncode == 0

    def close(self):
        run("ip", "link", "del", "dev", "probe0")
        self.process.kill()
        self.process.wait()


def config(image, initrd, network):
    options = "console=ttyS0 panic=-1 quiet no_timer_check tsc=reliable mitigations=off nokaslr random.trust_cpu=on"
    arguments = ["-cpu", "max", "-kernel", str(image.kernel), "-initrd", str(initrd), "-append", options]
    qemu = f"qemu.default = {{ accelerators = ['tcg,thread=multi'], arguments = {json.dumps(arguments)} }}\n"
    return f"{qemu}network.lan = {{ {network} }}\n"


def over_and_home(folder):
    from guest import Image
    image = Image()
    initrd = image.begun_by(INIT, folder / "initrd")
    content = folder / "content"
    content.mkdir()
    (content / "token").write_text("the machine itself\n")
    disk = folder / "data.img"
    with open(disk, "wb") as out:
        out.truncate(16 * MIB)
    run("mkfs.ext4", "-q", "-d", content, disk)
    target = folder / "target.toml"
    target.write_text("[machines]\n" + config(
        image, initrd, "bridge = 'br-dr', addresses = [{ from = '192.0.2.0/24', to = '198.51.100.0/24' }]"))
    bridge("br-src", "192.0.2.1/24")
    cluster = Cluster(folder, {"data": 0}, images={"data": disk}, target_args=("--config", target),
                      source_config="[machines]\n" + config(image, initrd, "bridge = 'br-src'"),
                      source_args=("--journal", folder / "source-journal", "--listen", f"127.0.0.1:{free_port()}", "--views",
                                   f"unix:{folder}/back.sock"))
    instances = folder / "target-state/machines/qemu"
    serial = lambda name: (instances / name / "serial.log").read_text(errors="replace")  # noqa: E731
    try:
        cluster.command("machine", "create", "web", "--group", cluster.GROUP, "--source", "qemu", "--target", "qemu", "--memory",
                        "384MiB", "--nic", f"dmz={MAC},address={HERE}/24,gateway=192.0.2.1", "--ready", "console:answers as",
                        "--ready-within", "2m", "--stop-within", "0s")
        cluster.settle()

        # What is not there is known before anything is stopped.
        text = fails(cluster, "failover", "planned", cluster.GROUP, code=3)
        expect("machines/web" in text and "\\\"dmz\\\"" in text and "machines.network.dmz" in text, text)
        cluster.command("machine", "update", "web", "--nic", f"lan={MAC},address={HERE}/24,gateway=192.0.2.1")
        text = fails(cluster, "failover", "planned", cluster.GROUP, code=3)
        expect("machines/web" in text and "\\\"lan\\\"" in text and "br-dr" in text, text)
        expect("br-dr" in cluster.command("machine", "probe", "web")["hindrance"], "the hindrance is not said")
        expect(cluster.status()["phase"] == "protected" and not cluster.command("failover", "list")["failovers"], text)
        bridge("br-dr", "198.51.100.1/24")
        expect(cluster.command("machine", "probe", "web")["hindrance"] is None, "nothing hinders it any more")

        tried(cluster, instances, serial)

        over = cluster.command("failover", "planned", cluster.GROUP, timeout=180)
        expect(states(over)["await-replica"] == "done", over["steps"])
        expect(f"answers as {THERE}/24, reaches its router: yes." in serial("web"), serial("web"))
        expect(token(THERE) == "the machine itself" and answers(HERE) is None, "it has its old address")
        expect(seen("br-dr") and not seen("br-src") and len(ours()) == 1, "it is in the wrong bridge")

        # Home, where everything is as it was.
        cluster.command("failback", "start", cluster.GROUP, timeout=120)
        eventually("the failback is ready to switch",
                   lambda: (reverse := cluster.command("failback", "status", cluster.GROUP)["reverse"]) and reverse["ready"], 120)
        switched = cluster.command("failback", "switch", cluster.GROUP, timeout=180)
        expect(states(switched)["start-source"] == "done", switched["steps"])
        eventually("it answers at home", lambda: answers(HERE) == "the machine itself", 90)
        expect(answers(THERE) is None and seen("br-src") and not seen("br-dr"), "it is still there")
        home = (folder / "source-state/machines/qemu/web/serial.log").read_text(errors="replace")
        expect("told anew" in home and f"answers as {HERE}/24" in home, home)
    finally:
        end(folder)
        cluster.close()
    # A proxy that starts again finds what guests that were killed have left.
    expect(len(ours()) == 1, ours())
    cluster.source.start()
    try:
        eventually("nothing that a proxy has made is left", lambda: not ours(), 30)
    finally:
        cluster.source.stop()


def tried(cluster, instances, serial):
    """A test answers where nobody else is, by the same addresses, and leaves nothing; also if its proxy and its guest die."""
    held = cluster.command("failover", "test", cluster.GROUP, "--hold", "10m", "--no-wait")
    step = lambda: states(cluster.command("failover", "show", held["operation"]))["hold"]  # noqa: E731
    eventually("the test is held", lambda: step() == "running", 120)
    [test] = instances.glob("web.test-*")
    said = serial(test.name)
    expect(f"answers as {THERE}/24, reaches its router: no." in said, said)
    isolated = {name for name in ours() if name.startswith("aib")}
    expect(len(isolated) == 1 and len(ours()) == 2, ours())
    [isolated] = isolated
    probe = Probe(isolated)
    try:
        eventually("the test answers in its bridge", lambda: probe.pings(THERE))
        expect(not probe.pings("198.51.100.1"), "this host answers in the bridge of a test")
    finally:
        probe.close()
    expect(answers(THERE) is None and not seen("br-dr") and seen(isolated), "production sees the test")

    cluster.target.kill()
    kill(test)
    expect(len(ours()) == 2, "nothing is left to be found")
    cluster.target.start()
    eventually("the proxy finds what is left", lambda: not ours(), 30)
    ended = cluster.command("failover", "cancel", held["operation"], timeout=90)
    expect(states(ended)["stop-test"] == "done" and not test.exists() and not ours(), ended["steps"])
    eventually("the group is protected", cluster.protected, timeout=60)


def kill(instance):
    """A guest, as if its process had been killed for memory."""
    pid = int((instance / "pid").read_text())
    expect(str(instance).encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes(), "not the guest")
    os.kill(pid, signal.SIGKILL)
    eventually("the guest is gone", lambda: not pathlib.Path(f"/proc/{pid}/cmdline").exists()
               or not pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())


def end(folder):
    """Guests outlive their proxies."""
    for pid in folder.glob("*-state/machines/qemu/*/pid"):
        try:
            kill(pid.parent)
        except (OSError, ValueError, Failed):
            pass


def main():
    os.environ.setdefault("LC_ALL", "C")
    if sys.argv[1:] != ["inside"]:
        # The kernel of guests may have to be fetched, which nothing in the namespace could do.
        from guest import Image
        Image()
        os.execvp("unshare", ["unshare", "--net", sys.executable, __file__, "inside"])
    run("ip", "link", "set", "lo", "up")
    tests = Tests()
    begun = time.monotonic()
    with workspace("networks") as folder:
        tests.run("networks: over into the target's bridge, tried in one of its own, and home", over_and_home, folder)
    print(f"  {time.monotonic() - begun:.1f} s, in emulation")
    tests.end()


if __name__ == "__main__":
    main()
