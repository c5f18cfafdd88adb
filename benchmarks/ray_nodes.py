"""A Ray cluster of several nodes on this machine, each of which can be lost as a machine is: all of its processes at once.

What such a cluster is made of is found by a variable in the environment of its processes, however they were started (Linux).
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

CPUS = 4  # of a node: logical, what Ray hands out
NODE = "MOCA_BENCHMARK_NODE"
READABLE = {"SPT_NOENV": "1"}  # Ray's titles of processes would be written over their environments
_RAY = str(Path(sys.executable).with_name("ray"))


class Nodes:
    """A head that drivers connect to and that has no CPUs, and `count` nodes with four each, with Ray's authentication on.

    `environment` reaches the cluster from a driver, and is what all of its processes start with.
    """

    def __init__(self, environment: dict[str, str], count: int) -> None:
        self._folder = tempfile.mkdtemp(prefix="nodes-", dir="/tmp")  # short: paths of sockets end at 107 bytes
        token = Path(self._folder, "token")
        token.write_text(secrets.token_hex(32))
        port, clients = free_ports(2)
        self._address = f"127.0.0.1:{port}"
        self.environment = environment | READABLE
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": self._address}
        self._started = 0
        self.names: list[str] = []
        head = ["--head", "--port", str(port), "--ray-client-server-port", str(clients), "--num-cpus", "0"]
        self._start([*head, "--include-dashboard", "true", "--dashboard-port", "0", "--temp-dir", self._folder])
        for _ in range(count):
            self.add()

    def add(self) -> None:
        # One log monitor is enough where all nodes write to one folder: each would repeat every line.
        joining = ["--address", self._address, "--num-cpus", str(CPUS), "--include-log-monitor", "false"]
        self.names.append(self._start(joining))

    def lose(self, name: str) -> None:
        """SIGKILL to every process of a node."""
        self.names.remove(name)
        kill_marked(NODE, name)

    def close(self) -> None:
        for number in range(self._started):
            kill_marked(NODE, self._name(number))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, options: list[str]) -> str:
        name = self._name(self._started)
        self._started += 1
        free = ["--dashboard-agent-listen-port", "0", "--min-worker-port", "0", "--max-worker-port", "0"]
        command = [
            _RAY,
            "start",
            *options,
            *free,
            "--node-ip-address",
            "127.0.0.1",
            "--object-store-memory",
            "100000000",
        ]
        marked = os.environ | self.environment | {NODE: name}
        done = subprocess.run(
            command, env=marked, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout[-3000:]}")
        return name

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number}"


def marked(name: str, value: str) -> list[psutil.Process]:
    """The processes that were started with this variable in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                found.append(process)
        except psutil.Error:
            continue  # it ended, or is not ours to read
    return found


def kill_marked(name: str, value: str) -> None:
    """SIGKILL to all of them, and to those that they still started meanwhile."""
    while processes := marked(name, value):
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=0.2)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
