"""One guest: its processor is emulated, its disks are what a test wants to know about.

Time in a guest without KVM runs by the host's clock while everything is some ten times slower: bounds are generous, and
no test may depend on them.
"""

import base64
import json
import re
import shlex
import socket
import subprocess
import threading
import time

from cluster import Failed, eventually, expect

from .image import Archive

BOOT = 120.0  # seconds; some five on an idle machine
FIRST = 8  # the slot of the first disk on the bus
HOST = "10.0.2.2"  # the loopback of the host, seen from a guest


class Lost(Failed):
    """The guest is gone: its power was cut, or it has died."""


class Guest:
    """A machine: describe its disks, then `boot`. Disks are named by the test and found in the guest by `block`."""

    def __init__(self, folder, image, name, memory=384, processors=1, net=False, tools=False, more_memory=0):
        self.folder, self.image, self.name = folder, image, name
        self.memory, self.processors, self.net = memory, processors, net
        self.more_memory = more_memory  # MiB that may be plugged in while it runs
        self.console = folder / f"{name}.console"
        self.log = folder / f"{name}.qemu.log"
        self.witnessed = []
        self.arguments = []
        self.disks = {}  # where on the bus each is
        self.files = Archive()
        self.process = None
        self.number = 0
        self.turn = threading.Lock()
        if tools:
            self.file("tools", image.tools, read_only=True)  # fio, with the many libraries that Debian builds it with

    # Disks. Each is at an address of its own on the bus, by which it is found again in the guest.

    def _disk(self, name, device):
        slot = FIRST + len(self.disks)
        self.disks[name] = f"0000:00:{slot:02x}.0"
        self.arguments += ["-device", f"{device},id={name},addr={slot:#x}"]

    def vhost_user(self, name, path, queues=1, reconnect=1, wce=False, options=""):
        """A disk of another process; with `wce` the guest may look up and choose whether there is a write cache."""
        wait = f",reconnect={reconnect}" if reconnect else ""
        self.arguments += ["-chardev", f"socket,id=chr-{name},path={path}{wait}"]
        self._disk(name, f"vhost-user-blk-pci,chardev=chr-{name},num-queues={queues},config-wce={'on' if wce else 'off'}{options}")

    def file(self, name, path, read_only=False, options=""):
        """A raw file, written to by QEMU itself."""
        read_only = "on" if read_only else "off"
        self.arguments += ["-blockdev", f"driver=file,node-name=file-{name},filename={path},read-only={read_only},locking=off",
                           "-blockdev", f"driver=raw,node-name=raw-{name},file=file-{name},read-only={read_only}"]
        self._disk(name, f"virtio-blk-pci,drive=raw-{name}{options}")

    def nbd(self, name, socket_path, export, reconnect=60, options=""):
        """An export of an NBD server on a socket of this host."""
        self.arguments += ["-blockdev", f"driver=nbd,node-name=nbd-{name},server.type=unix,server.path={socket_path},"
                                        f"export={export},reconnect-delay={reconnect},discard=unmap"]
        self._disk(name, f"virtio-blk-pci,drive=nbd-{name}{options}")

    def plug(self, name, path):
        """A disk of another process, into the machine while it runs: one at a time. `unplug` before the next."""
        self.qmp("chardev-add", id=f"chr-{name}", backend={"type": "socket", "data": {
            "addr": {"type": "unix", "data": {"path": str(path)}}, "server": False, "reconnect": 1}})
        self.qmp("device_add", driver="vhost-user-blk-pci", id=name, chardev=f"chr-{name}", bus="hot0", num_queues=1,
                 config_wce=False)
        # The only device behind the only port.
        bus = self.do("for try in $(seq 200); do ls -d /sys/bus/pci/devices/0000:00:03.0/0000:*/virtio*/block/* 2>/dev/null && break; "
                      "usleep 50000; done")
        self.disks[name] = re.search(r"0000:00:03.0/(0000:[0-9a-f:.]+)/", bus).group(1)

    def unplug(self, name):
        self.qmp("device_del", id=name)
        eventually(f"{name} is unplugged", lambda: self.run(f"[ -e /sys/bus/pci/devices/{self.disks[name]} ]")[0] != 0, 60)
        del self.disks[name]

    def plug_memory(self, size):
        """More memory for a machine that was given `more_memory`."""
        self.qmp("object-add", qom_type="memory-backend-memfd", id="more", size=size, share=True)
        self.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")

    # Life.

    def boot(self, root=None, timeout=BOOT):
        """Starts the machine, from memory or from a disk that holds the image's `root`; returns when its shell answers."""
        limit = time.monotonic() + timeout
        initrd = self.image.initrd(self.folder / f"{self.name}.cpio", self.files)
        paths = {port: self.folder / f"{self.name}.{port}" for port in ("shell", "witness")}
        kernel = [
            "-kernel", str(self.image.kernel), "-initrd", str(initrd),
            "-append", "console=ttyS0 panic=-1 loglevel=6 no_timer_check tsc=reliable mitigations=off nokaslr random.trust_cpu=on"
            + (f" lab.root={self.disks[root]}" if root else ""),
            "-device", "virtio-serial-pci,addr=0x2"]
        for port in ("shell", "witness"):
            kernel += ["-chardev", f"socket,id={port},path={paths[port]},server=on,wait=off",
                       "-device", f"virtserialport,chardev={port},name={port}"]
        try:
            self._start(kernel, limit)
            self.shell = self._connect(paths["shell"], limit)
            self.unread = b""
            witness = self._connect(paths["witness"], limit)
            self.reader = threading.Thread(target=self._witness, args=(witness,), daemon=True)
            self.reader.start()
            self.number = 0
            self._answer(0, limit)
            if "tools" in self.disks:
                self.do(f"mount -r {self.block('tools')} /tools")
        except (Failed, OSError) as error:
            self.power_cut()
            raise Failed(f"guest {self.name} does not boot: {error}\n{self.tail()}") from None
        return self

    def boot_sector(self, text, timeout=BOOT):
        """Starts the machine without a kernel: its firmware runs what the first disk begins with, which says this."""
        try:
            self._start([], time.monotonic() + timeout)
            eventually(f"the console shows `{text}`", lambda: self.alive() and text in self.console.read_text(errors="replace"), timeout)
        except (Failed, OSError) as error:
            raise Failed(f"guest {self.name} does not boot: {error}\n{self.tail()}") from None
        finally:
            self.power_cut()

    def _start(self, more, limit):
        command = [
            "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-machine", "q35,memory-backend=mem", "-cpu", "max",
            "-smp", str(self.processors), "-m",
            f"{self.memory}M" + (f",slots=2,maxmem={self.memory + self.more_memory}M" if self.more_memory else ""),
            "-nodefaults", "-no-user-config", "-display", "none",
            # Guests share their memory with whoever serves their disks.
            "-object", f"memory-backend-memfd,id=mem,size={self.memory}M,share=on",
            "-no-reboot", "-serial", f"file:{self.console}",
            "-qmp", f"unix:{self.folder / self.name}.qmp,server=on,wait=off",
            # Where disks can be plugged in while it runs.
            "-device", "pcie-root-port,id=hot0,chassis=1,addr=0x3", *more]
        if self.net:
            command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=,addr=0x4"]
        (self.folder / f"{self.name}.command").write_text(shlex.join([*command, *self.arguments]) + "\n")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([*command, *self.arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.qmp = Monitor(self._connect(f"{self.folder / self.name}.qmp", limit))

    def _connect(self, path, limit):
        link = socket.socket(socket.AF_UNIX)

        def connected():
            if self.process.poll() is not None:
                raise Lost(f"QEMU has ended with {self.process.returncode}")
            try:
                link.connect(str(path))
                return True
            except OSError:
                return False
        eventually(f"QEMU listens at {path}", connected, max(1.0, limit - time.monotonic()))
        return link

    def _witness(self, link):
        """Notes each line with its time until the power is off."""
        rest = b""
        while True:
            try:
                got = link.recv(65536)
            except OSError:
                got = b""
            if not got:
                return
            *lines, rest = (rest + got).split(b"\n")
            now = time.monotonic()
            self.witnessed += [(now, line.decode(errors="replace")) for line in lines]

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def tail(self, lines=25):
        def last(path):
            return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
        return f"{last(self.log)}\n{last(self.console)}"

    def power_cut(self):
        """What the guest holds in memory is gone at once."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            if hasattr(self, "reader"):
                self.reader.join(timeout=10)

    def shutdown(self, timeout=60):
        """The guest itself switches off, its file systems written."""
        if not self.alive():
            return
        try:
            self.run("sync; grep -E '^/dev/(vd|ublk|nbd|dm)' /proc/mounts | cut -d' ' -f2 | sort -r | xargs -r -n1 umount",
                     timeout=timeout)
        except Failed:
            pass
        try:
            self.shell.sendall(f"999999 {base64.b64encode(b'poweroff -f').decode()}\n".encode())
            self.process.wait(timeout=timeout)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.power_cut()

    def close(self):
        self.power_cut()

    # What it does.

    def _answer(self, number, limit):
        mark = re.compile(rb"(?:^|\n|(?<=.))=%d= (\d+)\n" % number)
        while True:
            found = mark.search(self.unread)
            if found:
                output, self.unread = self.unread[:found.start()], self.unread[found.end():]
                return int(found.group(1)), output.decode(errors="replace").strip("\n")
            left = limit - time.monotonic()
            if left <= 0:
                raise Failed(f"no answer in time; so far: {self.unread[-2000:].decode(errors='replace')}")
            self.shell.settimeout(left)
            try:
                got = self.shell.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                got = b""
            if not got:
                raise Lost(f"guest {self.name} is gone\n{self.tail()}")
            self.unread += got

    def run(self, script, timeout=120.0):
        """A shell script in the guest: its exit code and all that it said."""
        with self.turn:
            if not self.alive():
                raise Lost(f"guest {self.name} is off")
            self.number += 1
            try:
                self.shell.settimeout(timeout)
                self.shell.sendall(f"{self.number} {base64.b64encode(script.encode()).decode()}\n".encode())
            except OSError as error:
                raise Lost(f"guest {self.name} is gone: {error}") from error
            return self._answer(self.number, time.monotonic() + timeout)

    def do(self, script, timeout=120.0):
        """A script that must succeed; what it said."""
        code, output = self.run("set -e\n" + script, timeout)
        expect(code == 0, f"guest {self.name}: exit code {code} of\n{script}\n{output[-3000:]}")
        return output

    def start(self, name, script):
        """A script in the background; `finished` waits for it. What it writes to file 9 reaches `witnessed`."""
        quoted = shlex.quote("set -e\n. /tmp/prelude\n" + script)
        self.do(f"(sh -c {quoted} >/tmp/{name}.out 2>&1 </dev/null; echo $? >/tmp/{name}.code.new; "
                f"mv /tmp/{name}.code.new /tmp/{name}.code) >/dev/null 2>&1 </dev/null &")

    def finished(self, name, timeout=120.0):
        """Waits for what was started; exit code and output."""
        code, output = self.run(f"until [ -e /tmp/{name}.code ]; do usleep 100000; done; cat /tmp/{name}.out; "
                                f"exit $(cat /tmp/{name}.code)", timeout)
        return code, output

    def load(self, module):
        self.do(f"load {module}")

    def block(self, name):
        """The device of a disk in the guest."""
        address = self.disks[name]
        return "/dev/" + self.do(f"for try in $(seq 100); do [ -e /sys/bus/pci/devices/{address}/virtio*/block/* ] && break; "
                                 f"usleep 50000; done; basename /sys/bus/pci/devices/{address}/virtio*/block/*")

    def queue(self, name, attribute):
        """What the kernel knows of a disk: `write_cache`, `logical_block_size`, …"""
        return self.do(f"cat /sys/block/{self.block(name).removeprefix('/dev/')}/queue/{attribute}")

    def complaints(self):
        """What the kernel has said about errors of disks or file systems."""
        return self.run("dmesg | grep -iE 'I/O error|blk_update|critical|EXT4-fs (error|warning)|XFS.*(error|corrupt)|"
                        "Buffer I/O|hung task|blocked for more|JBD2.*(error|abort)|Remounting'")[1]


class Monitor:
    """QEMU's own commands (QMP)."""

    def __init__(self, link):
        link.settimeout(30)
        self.file = link.makefile("rw")
        self.events = []
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.file.write(json.dumps({"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}) + "\n")
        self.file.flush()
        while True:
            line = self.file.readline()
            if not line:
                raise Lost("QEMU has closed its monitor")
            answer = json.loads(line)
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise Failed(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]
