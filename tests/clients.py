#!/usr/bin/python3
"""Real NBD clients against real processes: a disk served alone, over Unix socket and TCP, and a protected pair, where
after each client the newest point, seen through a view, must be what the source's disk holds.

Needs nbdinfo, nbdcopy (libnbd-bin), qemu-img, qemu-io (qemu-utils), fio, python3-libnbd.
"""

import contextlib
import json
import random
import socket
import ssl
import subprocess
import sys

import nbdtext
import protocol
from cluster import AFTERIMAGE, MIB, Cluster, Failed, Served, Tests, expect, eventually, digest, random_file, run, workspace

SIZE = 96 * MIB
ODD = 4 * MIB + 4608


def info(uri, size):
    """nbdinfo understands what is on offer."""
    [export] = json.loads(run("nbdinfo", "--json", uri))["exports"]
    expect(export["export-size"] == size, f"size {export['export-size']}")
    expect(export["is_read_only"] is False, "read-only")
    for ability in ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_df"):
        expect(export[ability] is True, f"{ability} is {export[ability]}")
    expect("base:allocation" in export["contexts"], f"contexts {export['contexts']}")
    expect(export["block_size_minimum"] in (1, 512), f"smallest block {export['block_size_minimum']}")
    expect(export["block_size_maximum"] >= 32 * MIB, f"largest request {export['block_size_maximum']}")


def listing(uri_without_export, name):
    """nbdinfo --list finds the export."""
    exports = json.loads(run("nbdinfo", "--json", "--list", uri_without_export))["exports"]
    expect(name in [e["export-name"] for e in exports], f"{name} is not among {exports}")


def extents(uri, folder):
    """nbdinfo --map tells data from holes, and never calls data a hole."""
    run("qemu-io", "-f", "raw", "-c", "discard 0 96M", uri)
    run("qemu-io", "-f", "raw", "-c", "write -P 0x5a 8M 1M", "-c", "write -P 0x5b 40M 64k", "-c", "flush", uri)
    extents = json.loads(run("nbdinfo", "--map", "--json", uri))
    expect(sum(e["length"] for e in extents) == SIZE, "the map has gaps")
    for at, length in ((8 * MIB, MIB), (40 * MIB, 65536)):
        for extent in extents:
            overlaps = extent["offset"] < at + length and at < extent["offset"] + extent["length"]
            expect(not overlaps or extent["type"] & 1 == 0, f"data at {at} is called a hole: {extent}")
    expect(any(e["type"] & 1 for e in extents), f"no hole in {extents}")


def copy(uri, folder):
    """nbdcopy both ways, over several connections."""
    wrote, read = folder / "copy-in.img", folder / "copy-out.img"
    random_file(wrote, SIZE, 1)
    run("nbdcopy", "--flush", "--connections=4", "--requests=64", wrote, uri)
    run("nbdcopy", "--connections=4", uri, read)
    run("cmp", wrote, read)
    read.unlink()
    wrote.unlink()


def convert(uri, folder):
    """qemu-img convert, compare and map."""
    image = folder / "convert.img"
    random_file(image, 20 * MIB, 2)
    with open(image, "r+b") as file:
        file.truncate(SIZE)
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri)
    qcow = folder / "convert.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, qcow)
    run("qemu-img", "compare", "-F", "raw", qcow, uri)
    extents = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", uri))
    expect(sum(e["length"] for e in extents) == SIZE, "the map has gaps")
    image.unlink()
    qcow.unlink()


def patterns(uri, folder):
    """qemu-io: patterns at odd offsets, zeroes, discards, and reads across their edges."""
    steps = [
        "write -P 0x11 0 1M",
        "write -P 0x22 1000 3000",
        "read -P 0x11 0 1000", "read -P 0x22 1000 3000", "read -P 0x11 4000 4096",
        "write -P 0x33 511 1", "read -P 0x11 500 11", "read -P 0x33 511 1", "read -P 0x11 512 488",
        "write -z 5000 10000", "read -P 0 5000 10000", "read -P 0x11 15000 1000",
        "write -z -u 64k 128k", "read -P 0 64k 128k",
        "write -f -P 0x44 200k 4k", "read -P 0x44 200k 4k",
        "discard 256k 256k", "read -P 0x11 512k 64k",
        "aio_write -P 0x55 700001 65535", "aio_write -P 0x66 800001 65535", "aio_flush",
        "read -P 0x55 700001 65535", "read -P 0x66 800001 65535",
        "write -P 0x77 100663295 1", "read -P 0x77 100663295 1",
        "flush",
    ]
    out = run("qemu-io", "-f", "raw", *[part for step in steps for part in ("-c", step)], uri).decode()
    expect("failed" not in out.lower(), out)


def verified(uri, folder):
    """fio writes at random, keeps what it wrote, and reads it back by checksum."""
    run("fio", "--name=verify", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-128k",
        "--bs_unaligned=0", "--blockalign=512", "--size=48M", "--iodepth=32", "--verify=crc32c", "--do_verify=1",
        "--verify_fatal=1", "--verify_backlog=256", "--randseed=7", "--fsync=64", cwd=folder, timeout=300)


CLIENTS = {"nbdinfo --map": extents, "nbdcopy": copy, "qemu-img": convert, "qemu-io": patterns, "fio": verified}


def alone(tests, folder):
    served = Served(folder, "disk", SIZE)
    try:
        for how, uri in (("unix", served.unix()), ("tcp", served.tcp())):
            tests.run(f"{how}: nbdinfo", info, uri, SIZE)
            tests.run(f"{how}: nbdinfo --list", listing, served.unix("") if how == "unix" else served.tcp(""), "disk")
            for name, client in CLIENTS.items():
                tests.run(f"{how}: {name}", client, uri, folder)
        for name, case in protocol.CASES.items():
            tests.run(f"libnbd: {name}", case, served.unix(), SIZE)
        for name, case in protocol.RAW.items():
            tests.run(f"raw bytes: {name}", case, str(served.socket), "disk", SIZE)
        for how, address in (("unix", str(served.socket)), ("tcp", ("127.0.0.1", served.port))):
            for name, case in nbdtext.CASES.items():
                tests.run(f"{how}: the text: {name}", case, address, "disk", SIZE)
        tests.run("the proxy lives after all this", served.process.check)
    finally:
        code = served.close()
    for size in (512, 4608, 5 * MIB + 1536):
        odd = Served(folder, f"odd{size}", size)
        tests.run(f"a disk of {size} bytes is what a model says", protocol.as_a_model_says, odd.unix(), size)
        odd.close()
    tests.run("a stopped proxy ends with 0", lambda: expect(code == 0, f"exit code {code}:\n{served.process.tail()}"))

    def kept():
        again = Served.__new__(Served)
        image = digest_file(served.image)
        again.__init__(folder, "again", 4 * MIB)
        again.close()
        expect(image == digest_file(served.image), "the image changed after the proxy had ended")
    tests.run("the image is the user's again", kept)


def digest_file(path):
    return run("sha256sum", path).split()[0]


def refused(tests, folder):
    """Mistakes are refused at once, by name, and leave nothing behind."""
    def says(words, *args):
        done = subprocess.run([AFTERIMAGE, *map(str, args)], capture_output=True, timeout=20, check=False)
        text = (done.stdout + done.stderr).decode()
        expect(done.returncode not in (0, 101), f"exit code {done.returncode}: {text}")
        for word in words:
            expect(word in text, f"`{word}` is not named: {text}")

    socket = folder / "refused.sock"
    odd = folder / "odd.img"
    odd.write_bytes(b"x" * 1000)
    tests.run("refused: a missing disk", says, ["missing.img"], "proxy", "--serve", f"d={folder}/missing.img", "--nbd", f"unix:{socket}")
    tests.run("refused: a size that is no multiple of the block", says, ["1000"], "proxy", "--serve", f"d={odd}", "--nbd", f"unix:{socket}")
    wrong = folder / "wrong.toml"
    wrong.write_text("name = \"x\"\nstate_dirr = \"y\"\n")
    tests.run("refused: a misspelt field", says, ["state_dirr"], "proxy", "--config", wrong)
    tests.run("refused: an address that is none", says, ["tcp:nowhere"], "proxy", "--serve", f"d={odd}", "--nbd", "tcp:nowhere")

    def locked():
        served = Served(folder, "locked", 4 * MIB)
        try:
            says(["locked.img"], "proxy", "--serve", f"d={served.image}", "--nbd", f"unix:{socket}")
        finally:
            served.close()
    tests.run("refused: a disk that another proxy has", locked)
    tests.run("refused: nothing half-made stays", lambda: expect(not socket.exists(), f"{socket} is left behind"))


def pair(tests, folder):
    image = folder / "data.img"
    random_file(image, 24 * MIB, 3)
    with open(image, "r+b") as file:
        file.truncate(SIZE)
    before = digest_file(image)
    cluster = None

    def begin():
        nonlocal cluster
        cluster = Cluster(folder, {"data": SIZE, "logs": 16 * MIB, "odd": ODD, "blocks": 2 * MIB},
                          options={"blocks": ",block=16384"})
    try:
        if not tests.run("a protected pair starts, and synchronises what the disk held", begin):
            return
        uri = cluster.uri("data")
        tests.run("protected: the first synchronisation is complete", cluster.replica_is_source)
        tests.run("protected: the disk is what it was", lambda: expect(digest(uri) == before, "it is not"))
        tests.run("protected: nbdinfo", info, uri, SIZE)
        for name, client in CLIENTS.items():
            if tests.run(f"protected: {name}", client, uri, folder):
                tests.run(f"protected: the newest point after {name}", cluster.replica_is_source)
        for name, case in protocol.CASES.items():
            tests.run(f"protected: libnbd: {name}", case, uri, SIZE)
        # One that is not whole blocks of 4096; one whose hosts should write larger blocks than they do.
        for disk, size in (("odd", ODD), ("blocks", 2 * MIB)):
            tests.run(f"protected: disk {disk} is what a model says", protocol.as_a_model_says, cluster.uri(disk), size)
        address, export = parts(uri)
        for name, case in nbdtext.CASES.items():
            tests.run(f"protected: the text: {name}", case, address, export, SIZE)
        tests.run("protected: the newest point after libnbd and raw bytes", cluster.replica_is_source)
        tests.run("a view with a delta speaks as the text says", text_on_a_view, cluster)
        tests.run("strangers at the target's port", strangers_at_the_target, cluster)
        tests.run("strangers at the coordinator's port", strangers_at_the_coordinator, cluster)
        tests.run("a view is read-only", read_only_view, cluster)
        tests.run("a view with a delta takes writes, the replica does not change", writable_view, cluster)
        tests.run("an older point still shows what was there", older_point, cluster)
        tests.run("the source restarts cleanly", restart, cluster, "source", False)
        tests.run("the source is killed and comes back", restart, cluster, "source", True)
        tests.run("the target is killed and comes back", restart, cluster, "target", True)
        tests.run("the coordinator is killed and comes back", restart, cluster, "coordinator", True)
    finally:
        if cluster:
            cluster.close()


def strangers(port):
    """Whoever has no certificate is told nothing, whatever it sends."""
    noise = random.Random(5)
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\xff\xff",
                 noise.randbytes(100_000), b"\x16\x03\x03\x40\x00\x01\x00\x3f\xfc" + noise.randbytes(16_380)):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
            with contextlib.suppress(OSError):
                plain.sendall(data)
                plain.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(OSError):
                while part := plain.recv(65536):
                    answer += part
            # A TLS alert, at most.
            expect(len(answer) < 100, f"{len(answer)} bytes in answer to garbage")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "afterimage-stream/1"])
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        with context.wrap_socket(plain, server_hostname="target") as tls:
            tls.sendall(noise.randbytes(1000))
            expect(not tls.recv(65536).startswith(b"AI"), "a stranger is welcomed")


def strangers_at_the_target(cluster):
    """The port on which streams arrive."""
    strangers(cluster.stream_port)
    expect(cluster.target.check() and cluster.protected(), "the group is not protected any more")
    # Half a handshake that never goes on holds nobody up.
    idle = [socket.create_connection(("127.0.0.1", cluster.stream_port)) for _ in range(50)]
    run("qemu-io", "-f", "raw", "-c", "write -P 0xc1 5M 64k", "-c", "flush", cluster.uri("data"))
    cluster.settle()
    for connection in idle:
        connection.close()


def strangers_at_the_coordinator(cluster):
    """The port of the gRPC API: a client without a certificate may spend a token, and nothing else."""
    strangers(cluster.port)
    grpc = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    for frame in (b"\xff" * 64, b"\xff\xff\xff\x01\x05\x00\x00\x00\x01" + b"\x82" * 1000, b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00"):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", cluster.port), timeout=10) as plain:
            with context.wrap_socket(plain, server_hostname="coordinator") as tls:
                tls.sendall(grpc + frame)
                while tls.recv(65536):
                    pass
    expect(cluster.coordinator.check() and cluster.status(), "the coordinator does not answer any more")


def read_only_view(cluster):
    import nbd
    cluster.settle()
    view = cluster.open_view("ro")
    try:
        handle = nbd.NBD()
        handle.connect_uri(view["data"])
        expect(handle.is_read_only(), "it does not say so")
        handle.set_strict_mode(0)
        try:
            handle.pwrite(b"x" * 512, 0)
        except nbd.Error as error:
            expect(error.errnum in (1, 30), f"a write fails with {error}")
        else:
            raise Failed("a write to it succeeds")
        handle.shutdown()
    finally:
        cluster.close_view("ro")


def writable_view(cluster):
    cluster.settle()
    before = digest(cluster.uri("data"))
    view = cluster.open_view("rw", writable=True)
    try:
        expect(digest(view["data"]) == before, "it does not begin as the newest point")
        run("qemu-io", "-f", "raw", "-c", "write -P 0x99 1000 100000", "-c", "flush", "-c", "read -P 0x99 1000 100000",
            view["data"])
        expect(digest(view["data"]) != before, "the write is not there")
        expect(digest(cluster.uri("data")) == before, "the write reached the source")
    finally:
        cluster.close_view("rw")
    cluster.replica_is_source()


def parts(uri):
    """Socket and export of a URI of ours."""
    return uri.split("socket=")[1], uri.split(":///")[1].split("?")[0]


def text_on_a_view(cluster):
    cluster.settle()
    view = cluster.open_view("text", writable=True)
    try:
        for name, case in nbdtext.CASES.items():
            try:
                case(*parts(view["data"]), SIZE)
            except Failed as error:
                raise Failed(f"{name}: {error}") from error
        for name, case in protocol.CASES.items():
            try:
                case(view["data"], SIZE)
            except Failed as error:
                raise Failed(f"libnbd: {name}: {error}") from error
    finally:
        cluster.close_view("text")
    cluster.replica_is_source()


def older_point(cluster):
    uri = cluster.uri("data")
    run("qemu-io", "-f", "raw", "-c", "write -P 0xa1 0 1M", "-c", "flush", uri)
    cluster.settle()
    before = digest(uri)
    cut = cluster.command("point", "cut", cluster.GROUP, "--label", "before")
    run("qemu-io", "-f", "raw", "-c", "write -P 0xa2 0 1M", "-c", "flush", uri)
    cluster.settle()
    view = cluster.open_view("older", f"seq:{cut['seq']}")
    try:
        expect(digest(view["data"]) == before, "it does not")
        expect(digest(uri) != before, "the source did not change")
    finally:
        cluster.close_view("older")


def restart(cluster, which, killed):
    process = getattr(cluster, which)
    if killed:
        process.kill()
    else:
        code = process.stop()
        expect(code == 0, f"exit code {code}:\n{process.tail()}")
    process.start()
    eventually("protected again", cluster_answers(cluster), timeout=90)
    # A coordinator that has just come back knows the group before the source has reported to it.
    uri = eventually("the disk is known again", lambda: known_again(cluster), timeout=60)
    eventually("the disk is served again", lambda: served_again(uri), timeout=60)
    run("qemu-io", "-f", "raw", "-c", "write -P 0xb1 3M 1M", "-c", "flush", uri)
    cluster.replica_is_source()


def cluster_answers(cluster):
    def answers():
        try:
            return cluster.protected()
        except (Failed, TypeError, KeyError):
            return None
    return answers


def known_again(cluster):
    try:
        return cluster.uri("data")
    except Failed:
        return None


def served_again(uri):
    try:
        return run("nbdinfo", "--size", uri)
    except Failed:
        return None


def main():
    tests = Tests()
    only = sys.argv[1:]
    for name, part in (("alone", alone), ("refused", refused), ("pair", pair)):
        if not only or name in only:
            with workspace(name) as folder:
                try:
                    part(tests, folder)
                except Failed as error:
                    tests.run(f"{name} can begin", lambda error=error: (_ for _ in ()).throw(error))
    tests.end()


if __name__ == "__main__":
    main()
