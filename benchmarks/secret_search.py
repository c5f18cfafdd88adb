"""Where secrets can be read: in files, in a database's dump, in the arguments of processes; as they are, and within base64."""

import base64
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from hosts import Host

_LENGTHS = range(3)  # of what stands before a secret in base64, modulo 3: it decides how the secret looks


def forms(secret: str) -> list[bytes]:
    """The secret, and what of it does not depend on its neighbours where it is part of something in base64."""
    found = [secret.encode()]
    for before in _LENGTHS:
        text = base64.b64encode(b"x" * before + secret.encode())
        found.append(text[(before * 8 + 5) // 6 : len(text) // 4 * 4 - 4])
    return found


def files(folder: Path, without: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file below a folder."""
    left_out = set(without)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path not in left_out:
            yield str(path.relative_to(folder)), path.read_bytes()


def arguments(hosts: Iterable[Host]) -> Iterator[tuple[str, bytes]]:
    """(name, command line) of every process, which everybody on its machine may read."""
    for host in hosts:
        for process in host.processes():
            try:
                yield f"process {process.name()} on {host.name}", " ".join(process.cmdline()).encode()
            except psutil.Error:
                continue  # it ended


def exposed(secrets: dict[str, str], places: Iterable[tuple[str, bytes]]) -> tuple[list[str], int]:
    """("SECRET in PLACE" of all that were found, how many places were looked at)."""
    wanted = {name: forms(secret) for name, secret in secrets.items()}
    found, looked = [], 0
    for place, content in places:
        looked += 1
        found += [f"{name} in {place}" for name, shapes in wanted.items() if any(shape in content for shape in shapes)]
    return found, looked
