"""Several targets on real processes: where groups go that name none."""

from cluster import MIB, Cluster, Failed, eventually, expect, free_port

SIZE = 32 * MIB


class Targets:
    """A source and a target at one site, and a second target at another."""

    def __init__(self, folder):
        self.folder = folder
        here = ("--site", "here")
        self.cluster = Cluster(folder, {"data": SIZE}, source_args=here, target_args=here)
        self.other = self.cluster.proxy("other", "--journal", folder / "journal-other", "--listen",
                                        f"127.0.0.1:{free_port()}", "--views", f"unix:{folder / 'views-other.sock'}",
                                        "--site", "there")
        eventually("both targets say how much room they have",
                   lambda: sum(p["room"] is not None for p in self.cluster.command("proxies")["proxies"]) == 2)

    def placed(self):
        """A group that names no target goes to the other site, and says why; one that is too large goes nowhere."""
        self.cluster.command("policy", "create", "small", "--journal-budget", "256MiB", "--cut-interval", "200ms")
        asked = ("placement", "explain", "--source", "source", "--policy", "small")
        found = self.cluster.command(*asked, "--size", SIZE)
        expect(found["target"] == "other", f"{found}")
        near = next(c for c in found["candidates"] if c["proxy"] == "target")
        expect(not near["fits"] and "site \"here\"" in near["reason"], f"{near}")
        image = self.folder / "web.img"
        with open(image, "wb") as out:
            out.truncate(SIZE)
        create = ("group", "create", "web", "--policy", "small", "--source", "source", "--disk", f"data={image}")
        group = self.cluster.command(*create)
        expect(group["target"] == "other" and "288.0 MiB needed" in group["placement"], f"{group}")
        eventually("it is protected there", lambda: self.state("web")["phase"] == "protected")
        try:
            self.cluster.command(*asked, "--size", "900TiB")
            raise Failed("a group of 900 TiB fits")
        except Failed as refused:
            expect("fits nowhere" in str(refused), f"{refused}")
        self.cluster.command("policy", "update", "small", "--same-site", "true")
        found = self.cluster.command(*asked, "--size", SIZE)
        near = next(c for c in found["candidates"] if c["proxy"] == "target")
        expect("site" not in near["reason"] and "needed" in near["reason"], f"{near}")
        self.cluster.command("policy", "update", "small", "--same-site", "false")

    def state(self, group):
        return self.cluster.command("status", group)["groups"][0]

    def close(self):
        self.cluster.close()


def play(tests, folder):
    """All of it, one after the other."""
    targets = None

    def begin():
        nonlocal targets
        targets = Targets(folder)
    try:
        if tests.run("two targets at two sites", begin):
            for name, step in (
                ("a group that names no target is placed", targets.placed),
            ):
                tests.run(name, step)
    finally:
        if targets:
            targets.close()
