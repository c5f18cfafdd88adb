"""What is held out, and where randomness comes from: both are functions of names, never of order or process.

Python's own hash() changes with every process, so everything here goes through sha256.
"""

import hashlib

import numpy as np


def stable_hash(*parts: str | int) -> int:
    """A 64-bit number that depends on the parts alone."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def is_held_out(name: str, one_in: int) -> bool:
    """Whether the content of this name is kept for evaluation: true for about one name in `one_in`."""
    return stable_hash("held-out", name) % one_in == 0


def rng_of(*parts: str | int) -> np.random.Generator:
    """A generator seeded by the parts alone."""
    return np.random.default_rng(stable_hash("rng", *parts))
