"""A Ray cluster of several machines on one: each has an address of its own, and dies with all its processes at once."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Machines:
    """`environment`: of someone who uses the cluster. The head does no work; `add` and `kill` are machines with one CPU, or as
    options of `ray start` say."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="mm-", dir="/tmp")  # short: the paths of sockets end at 107 bytes
        self.processes: dict[str, subprocess.Popen] = {}
        self.address = f"127.0.0.1:{free_port()}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MOCA_"))}
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": self.folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        port = self.address.split(":")[1]
        self._start("127.0.0.1", "--head", f"--port={port}", "--include-dashboard=false", "--num-cpus=0")
        self.environment["RAY_ADDRESS"] = self.address

    def add(self, ip: str, *options: str) -> None:
        self._start(ip, f"--address={self.address}", *(options or ["--num-cpus=1"]))

    def kill(self, ip: str) -> None:
        """As when the power is cut."""
        process = self.processes.pop(ip)
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in tree:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue  # it went with its parent
        process.wait()

    def close(self) -> None:
        for ip in [*self.processes][::-1]:
            self.kill(ip)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, ip: str, *options: str) -> None:
        command = [RAY, "start", "--block", f"--node-ip-address={ip}", "--object-store-memory=80000000", *options]
        log = Path(self.folder, f"{ip}.log")
        with log.open("w") as output:
            self.processes[ip] = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 120
        while "--block" not in log.read_text():  # what it says of itself when all is up
            assert self.processes[ip].poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
