"""A network of hosts on this machine: Linux namespaces joined by a bridge (`unshare`, `nsenter`, `ip`). Needs root.

A host has its own address, name, processes, /tmp and /dev/shm, and sees nothing of the others but what comes over its link. The machine's
own network is left alone, and everything is gone when the processes that hold the namespaces are.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

_SUBNET = "10.77.0"
_BRIDGE = "bridge0"
_IDLE = "while :; do sleep 5; done"  # a shell, as the first process of a host has to bury its orphans
_NAMESPACES = ("net", "mount", "uts", "pid")
_FETCH = """
import http.client, json, os, sys, urllib.error, urllib.request
try:
    with urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=json.loads(os.environ["HEADERS"])), timeout=10) as answer:
        status, body = answer.status, answer.read()
except urllib.error.HTTPError as error:
    status, body = error.code, error.read()
except (OSError, http.client.HTTPException):  # the latter: it speaks something else
    status, body = 0, b""
print(status, body.decode(errors="replace"))
"""
_WITH_US = ["setpriv", "--pdeathsig", "KILL"]  # whatever ends this program, no host outlives it


class Host:
    """A machine, as far as its programs can tell. They start with `environment`, and with what is added to it.

    Its /tmp is `folder`/tmp outside; one that is not `private` has the machine's, and its /dev/shm. `shared` is its /mnt.
    """

    def __init__(self, name: str, address: str, folder: Path, private: bool, shared: Path | None) -> None:
        self.name, self.address, self.folder = name, address, folder
        (folder / "tmp" / "home").mkdir(parents=True)
        (folder / "names").touch()
        steps = ["mount -t proc proc /proc", f"mount --bind '{folder}/names' /etc/hosts", f"hostname {name}"]
        if shared:
            steps += [f"mount --bind '{shared}' /mnt"]
        if private:
            steps += ["mount -t tmpfs -o size=512m tmpfs /dev/shm", f"mount --bind '{folder}/tmp' /tmp"]
        temporary = Path("/tmp") if private else folder / "tmp"
        script = " && ".join([*steps, "cd /", f"touch '{temporary}/.up'", _IDLE])
        namespaces = [f"--{name}" for name in _NAMESPACES]
        self._holder = subprocess.Popen(
            [*_WITH_US, "unshare", *namespaces, "--fork", "--kill-child", "sh", "-c", script]
        )
        wait_until((folder / "tmp" / ".up").exists, f"host {name} is up", within_s=20)
        (inside,) = psutil.Process(self._holder.pid).children()
        self.pid = inside.pid  # of its first process, as the machine numbers it
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": programs, "LANG": "C.UTF-8", "HOME": f"{temporary}/home"}
        self.environment["TMPDIR"] = str(temporary)

    def start(self, command: list[str], log: Path | None = None, folder: str = "/", **added: str) -> subprocess.Popen:
        """A program in the host, in `folder`, with variables added to its environment; its output goes to `log`, or to a pipe."""
        output: Any = log.open("ab") if log else subprocess.PIPE
        entered = ["nsenter", "--target", str(self.pid), *(f"--{name}" for name in _NAMESPACES)]
        try:
            return subprocess.Popen(
                [*entered, "env", "-C", folder, *command],
                env=self.environment | added,  # not as arguments, which everybody may read
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=None if log else True,
            )
        finally:
            if log:
                output.close()

    def run(self, *command: str, within_s: float = 60, **added: str) -> str:
        """What a program prints that ends well. Raises RuntimeError with its output if it does not."""
        process = self.start(list(command), **added)
        try:
            output, _ = process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise RuntimeError(f"{self.name}: {' '.join(command)}: not done after {within_s:.0f} s") from None
        if process.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}: {output[-3000:]}")
        return output

    def fetch(self, url: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and text of what a page answers to this host; status 0 where nobody speaks HTTP."""
        status, _, text = self.run("python", "-c", _FETCH, url, HEADERS=json.dumps(headers or {})).partition(" ")
        return int(status), text

    def processes(self) -> list[psutil.Process]:
        """All of them, by their numbers on the machine."""
        mine, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == mine:
                    found.append(process)
            except OSError:
                continue  # it ended
        return found

    def end(self) -> None:
        """All of its processes at once: the kernel kills what is left when the first one is gone."""
        self._holder.kill()
        self._holder.wait()


class Network:
    """A bridge, and the hosts that are plugged into it. What is in `shared` all of them see as /mnt."""

    def __init__(self, folder: Path, shared: Path | None = None) -> None:
        if sys.platform != "linux" or os.geteuid():
            raise SystemExit("hosts are made of Linux namespaces: run this as root on Linux (unshare, nsenter and ip)")
        for place in (Path(__file__), Path(sys.executable)):
            if place.is_relative_to("/tmp"):  # a host has a /tmp of its own
                raise SystemExit(f"{place}: hosts cannot see what lies in /tmp; run this from another folder")
        self._folder, self._shared = folder, shared
        self._count = 0
        self.hosts: dict[str, Host] = {}
        self._switch = subprocess.Popen([*_WITH_US, "unshare", "--net", "sh", "-c", _IDLE])
        outside = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{self._switch.pid}/ns/net") != outside, "the bridge is up", within_s=20)
        self._ip("link", "add", "name", _BRIDGE, "type", "bridge")
        self._ip("link", "set", "dev", _BRIDGE, "up")

    def add(self, name: str, private: bool = True) -> Host:
        """A host that all others know by its name."""
        self._count += 1
        host = Host(name, f"{_SUBNET}.{self._count}", self._folder / name, private, self._shared)
        self.hosts[name] = host
        self._ip("link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        self._ip("link", "set", "dev", name, "up", "master", _BRIDGE)
        for link in ("lo", "eth0"):
            host.run("ip", "link", "set", "dev", link, "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        for one in self.hosts.values():
            (one.folder / "names").write_text(names(one, self.hosts.values()))
        return host

    def cut(self, name: str) -> None:
        """What goes to and from a host is lost in silence, as where a cable breaks further away."""
        self._ip("link", "set", "dev", name, "nomaster")

    def restore(self, name: str) -> None:
        self._ip("link", "set", "dev", name, "master", _BRIDGE)

    def lose(self, name: str) -> None:
        """As by a power failure: nobody gets a last word from it."""
        self.cut(name)
        self.hosts.pop(name).end()

    def close(self) -> None:
        for host in self.hosts.values():
            host.end()
        self._switch.kill()
        self._switch.wait()

    def _ip(self, *arguments: str) -> None:
        command = ["nsenter", "--target", str(self._switch.pid), "--net", "ip", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def names(of: Host, hosts: Iterable[Host]) -> str:
    """A host's /etc/hosts. Its own name is 127.0.1.1 to itself, as Debian and Ubuntu install it."""
    known = [f"{'127.0.1.1' if host is of else host.address} {host.name}\n" for host in hosts]
    return "".join(["127.0.0.1 localhost\n", *known])


def wait_until(true: Callable[[], bool], what: str, within_s: float, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {within_s:.0f} s")
        time.sleep(every_s)
