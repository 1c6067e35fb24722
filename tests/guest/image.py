"""The kernel and the initial file system of a guest, made from Debian packages and cached.

The kernel is the newest behind a meta package of a fixed series: nothing is installed, the package is only unpacked.
What boots is the uncompressed kernel by its PVH entry with an uncompressed archive: without KVM, unpacking inside the
guest would take longer than everything else.
"""

import fcntl
import hashlib
import lzma
import os
import pathlib
import re
import shutil
import stat
import struct
import subprocess

from cluster import MIB, TARGET, Failed, expect, run

META = "linux-image-6.12-cloud-amd64"
# Ready to be loaded in a guest, with all that they depend on; what is built in is passed over.
MODULES = ["virtio_blk", "virtio_net", "virtio_console", "ublk_drv", "nbd", "null_blk", "loop", "dm_flakey",
           "dm_log_writes", "sch_netem", "xfs", "vfat", "nls_cp437", "nls_ascii"]
# In the archive, so in each guest; all else on the disk with tools.
SMALL = ["/sbin/mkfs.ext4", "/sbin/e2fsck", "/sbin/blkdiscard", "/usr/bin/fallocate", "/sbin/dmsetup", "/sbin/blockdev"]
LARGE = ["/usr/bin/fio"]
ROOT = 48 * MIB
HERE = pathlib.Path(__file__).resolve().parent


class Archive:
    """A cpio archive in the format that the kernel unpacks ("newc")."""

    def __init__(self):
        self.names = set()
        self.parts = []
        self.entries = []

    def _entry(self, name, mode, data=b"", device=(0, 0)):
        name = name.strip("/")
        if name in self.names:
            return
        parent = os.path.dirname(name)
        if parent:
            self.folder(parent)
        self.names.add(name)
        self.entries.append((name, mode, data))
        raw = name.encode() + b"\0"
        fields = (len(self.names), mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw), 0)
        head = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + raw
        self.parts += [head, b"\0" * (-len(head) % 4), data, b"\0" * (-len(data) % 4)]

    def folder(self, name):
        self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name, data, mode=0o755):
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name, to):
        self._entry(name, stat.S_IFLNK | 0o777, to.encode())

    def device(self, name, major, minor):
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def program(self, path, at=None):
        """A program of this machine, with the libraries that it loads."""
        path = os.path.realpath(path)
        self.file(at or path, pathlib.Path(path).read_bytes())
        for name, library in libraries(path):
            self.file(name, library.read_bytes())

    def bytes(self):
        """The archive, ended as the kernel wants it; another may follow."""
        parts = list(self.parts)
        raw = b"TRAILER!!!\0"
        head = b"070701" + b"".join(b"%08x" % v for v in (0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, len(raw), 0)) + raw
        parts += [head, b"\0" * (-len(head) % 4)]
        whole = b"".join(parts)
        return whole + b"\0" * (-len(whole) % 512)


    def unpack(self, folder):
        """The same as files; devices are left to whoever runs from them."""
        for name, mode, data in self.entries:
            path = folder / name
            if stat.S_ISDIR(mode):
                path.mkdir(exist_ok=True)
            elif stat.S_ISLNK(mode):
                path.symlink_to(data.decode())
            elif stat.S_ISREG(mode):
                path.write_bytes(data)
                path.chmod(mode & 0o777)


def libraries(path):
    """(the name it is loaded by, where it is) of all that the dynamic linker would load."""
    done = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
    found = re.findall(r"^\s*(?:\S+ => )?(/\S+) \(0x", done.stdout, re.M)
    return [(name, pathlib.Path(name).resolve()) for name in found]


def update_lists():
    """What packages there are, anew."""
    run(*([] if os.geteuid() == 0 else ["sudo", "-n"]), "apt-get", "-q", "update", timeout=300)


def kernel_package():
    """The real package behind the meta package, and its version."""
    try:
        shown = run("apt-cache", "show", "--no-all-versions", META).decode()
    except Failed:
        update_lists()
        shown = run("apt-cache", "show", "--no-all-versions", META).decode()
    found = re.search(r"^Depends:.*?(linux-image-[^ ,(]+)", shown, re.M)
    expect(found, f"{META} depends on no kernel")
    name = found.group(1)
    version = re.search(r"^Version: (\S+)", run("apt-cache", "show", "--no-all-versions", name).decode(), re.M)
    return name, version.group(1)


def uncompressed(compressed):
    """The kernel itself out of the file that a boot loader would load."""
    setup = compressed[0x1F1] or 4
    expect(compressed[0x202:0x206] == b"HdrS", "not a kernel image")
    offset, length = struct.unpack_from("<II", compressed, 0x248)
    start = (setup + 1) * 512 + offset
    # The last four bytes say how long it is when unpacked.
    payload, size = compressed[start:start + length - 4], struct.unpack_from("<I", compressed, start + length - 4)[0]
    done = subprocess.run(["zstd", "-dc"], input=payload, capture_output=True, check=False)
    expect(done.returncode == 0 and len(done.stdout) == size and done.stdout[:4] == b"\x7fELF",
           f"the kernel cannot be unpacked: {done.stderr.decode(errors='replace')}")
    return done.stdout


class Image:
    """The files that guests are started from. Making it takes some seconds, once for each kernel and set of tools."""

    def __init__(self):
        self.cache = TARGET / "guest"
        self.cache.mkdir(parents=True, exist_ok=True)
        with open(self.cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._make()

    def initrd(self, path, files):
        """What a guest is started from: the image's archive, and these files over it."""
        path.write_bytes(self.archive.read_bytes() + files.bytes())
        return path

    def begun_by(self, script, path):
        """What a guest is started from that runs this script, and nothing of the image's own."""
        files = Archive()
        files.file("init", script.encode())
        return self.initrd(path, files)

    def _make(self):
        package, version = kernel_package()
        self.release = package.removeprefix("linux-image-")
        inputs = hashlib.sha256(repr((version, MODULES, SMALL, LARGE)).encode())
        for path in [HERE / "image.py", HERE / "init", *map(pathlib.Path, SMALL + LARGE), pathlib.Path("/bin/busybox")]:
            expect(path.exists(), f"{path} is missing")
            about = path.read_bytes() if path.parent == HERE else repr((path.stat().st_size, path.stat().st_mtime)).encode()
            inputs.update(str(path).encode() + about)
        self.folder = self.cache / f"{self.release}-{inputs.hexdigest()[:12]}"
        self.kernel, self.archive = self.folder / "vmlinux", self.folder / "base.cpio"
        # A disk with programs that need many libraries, and one that a guest runs from: `Guest.boot(root=…)`.
        self.tools, self.root = self.folder / "tools.img", self.folder / "root.img"
        if self.tools.exists():
            return
        for old in self.cache.glob("*-cloud-*"):
            # Guests that are running have these files open.
            shutil.rmtree(old, ignore_errors=True)
        work = self.cache / f"making-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            self._build(work, package, version)
            work.rename(self.folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _build(self, work, package, version):
        unpacked = work / "unpacked"
        unpacked.mkdir(parents=True)
        try:
            run("apt-get", "download", "-q", f"{package}={version}", cwd=work, timeout=300)
        except Failed:
            # The list is of a time before this version was replaced.
            update_lists()
            package, version = kernel_package()
            self.release = package.removeprefix("linux-image-")
            run("apt-get", "download", "-q", f"{package}={version}", cwd=work, timeout=300)
        (deb,) = work.glob("*.deb")
        run("dpkg", "-x", deb, unpacked)
        deb.unlink()
        (work / "vmlinux").write_bytes(uncompressed((unpacked / "boot" / f"vmlinuz-{self.release}").read_bytes()))
        base = Archive()
        modules = Modules(unpacked / "lib" / "modules" / self.release)
        for name in MODULES:
            order = modules.order(name)
            base.file(f"modules/{name}.order", "".join(f"{m}\n" for m in order).encode(), 0o644)
            for module in order:
                base.file(f"modules/{module}.ko", modules.read(module), 0o644)
        for folder in ("proc", "sys", "dev", "tmp", "run", "mnt", "tools", "var/tmp", "root"):
            base.folder(folder)
        base.device("dev/console", 5, 1)
        base.file("init", (HERE / "init").read_bytes())
        base.file("bin/busybox", pathlib.Path("/bin/busybox").read_bytes())
        # The folders of Debian, merged: a library's name is the same here and there.
        for applet in run("/bin/busybox", "--list").decode().split():
            if f"{applet}" not in {pathlib.Path(p).name for p in SMALL}:
                base.link(f"bin/{applet}", "busybox")
        for path in SMALL:
            base.program(path, at=f"sbin/{pathlib.Path(path).name}")
        (work / "base.cpio").write_bytes(base.bytes())
        shutil.rmtree(unpacked)
        large = work / "large"
        (large / "lib").mkdir(parents=True)
        for path in LARGE:
            shutil.copy(os.path.realpath(path), large / pathlib.Path(path).name)
            for name, library in libraries(path):
                shutil.copy(library, large / "lib" / pathlib.Path(name).name)
        size = sum(f.stat().st_size for f in large.rglob("*"))
        with open(work / "tools.img", "wb") as disk:
            disk.truncate((size * 5 // 4 // MIB + 16) * MIB)
        run("mkfs.ext4", "-q", "-O", "^has_journal", "-d", large, work / "tools.img")
        shutil.rmtree(large)
        system = work / "system"
        system.mkdir()
        base.unpack(system)
        with open(work / "root.img", "wb") as disk:
            disk.truncate(ROOT)
        run("mkfs.ext4", "-q", "-d", system, work / "root.img")
        shutil.rmtree(system)


class Modules:
    """Kernel modules as packaged, and what each depends on, which is said in the module itself."""

    def __init__(self, folder):
        self.files = {}
        for path in folder.rglob("*.ko*"):
            self.files[path.name.split(".ko")[0].replace("-", "_")] = path
        self.builtin = {pathlib.Path(line).name.split(".ko")[0].replace("-", "_")
                        for line in (folder / "modules.builtin").read_text().split()}
        self.contents = {}

    def read(self, name):
        if name not in self.contents:
            path = self.files[name]
            raw = path.read_bytes()
            self.contents[name] = lzma.decompress(raw) if path.suffix == ".xz" else raw
        return self.contents[name]

    def order(self, name):
        """The module after all that it needs."""
        if name in self.builtin:
            return []
        if name not in self.files:
            raise Failed(f"the kernel has no module {name}")
        found = re.search(rb"\0depends=([^\0]*)\0", self.read(name))
        order = []
        for needed in (found.group(1).decode().split(",") if found and found.group(1) else []):
            order += [m for m in self.order(needed.replace("-", "_")) if m not in order]
        return [*order, name]
