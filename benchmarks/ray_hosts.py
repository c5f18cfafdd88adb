"""A Ray cluster on hosts of their own, and somebody who submits jobs to it from another one, as docs/clusters.md says."""

import json
import subprocess
from pathlib import Path

from hosts import Host, wait_until
from services import Secrets

REPOSITORY = Path(__file__).parents[1]
DASHBOARD = "http://head:8265"
TRAINING = "moca.role=training"
_HEAD, _WITH = "--head --dashboard-host 0.0.0.0 --num-cpus 0", "--address {head}:6379 --num-cpus {cpus}"
_ALL = "--node-ip-address {address} --object-store-memory 200000000 --block"
# As systemd and Kubernetes do: what ended is started again. A node that was declared dead ends by itself.
_AGAIN = "while :; do ray start {options}; sleep 3; done"
_READY_S = 120


def give_token(host: Host, known: Secrets) -> None:
    """Where `ray get-auth-token --generate` leaves it."""
    home = host.folder / "tmp" / "home"
    (home / ".ray").mkdir(mode=0o700, exist_ok=True)
    file = home / ".ray" / "auth_token"
    file.touch(mode=0o600)
    file.write_text(known.ray_token)
    host.environment |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def start_ray(
    host: Host, known: Secrets, log: Path, head: Host | None = None, cpus: int = 0, training: bool = False
) -> None:
    """Ray on a host, for as long as the host is there: the head, or a node that joins one."""
    give_token(host, known)
    host.environment |= known.of_clients()  # every process of a node inherits them; no job has to name them
    host.environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own = _WITH.format(head=head.address, cpus=cpus) if head else _HEAD
    options = f"{own} {_ALL.format(address=host.address)}" + (f" --labels {TRAINING}" if training else "")
    host.start(["sh", "-c", _AGAIN.format(options=options)], log)


class User:
    """Someone on a host outside of the cluster, with its token and a copy of the repository."""

    def __init__(self, host: Host, known: Secrets) -> None:
        self.host = host
        self._token = known.ray_token
        give_token(host, known)
        host.environment |= {"RAY_API_SERVER_ADDRESS": DASHBOARD, "PYTHONUNBUFFERED": "1"}  # lines as they come

    def submit(self, log: Path, command: list[str], *options: str) -> subprocess.Popen:
        """`ray job submit`, which prints what the job prints and ends with it."""
        submitted = ["ray", "job", "submit", "--working-dir", ".", *options, "--", *command]
        return self.host.start(submitted, log, folder=str(REPOSITORY))

    def wait_for_nodes(self, count: int, within_s: float = _READY_S) -> None:
        """Until so many nodes are alive, the head included."""
        wait_until(lambda: self._alive() == count, f"{count} nodes of Ray", within_s, every_s=2)

    def ask(self, path: str) -> tuple[int, str]:
        """What the dashboard answers to somebody with the token."""
        return self.host.fetch(DASHBOARD + path, {"Authorization": f"Bearer {self._token}"})

    def _alive(self) -> int:
        status, text = self.ask("/nodes?view=summary")
        if status != 200:
            return 0
        return sum(node["raylet"]["state"] == "ALIVE" for node in json.loads(text)["data"]["summary"])
