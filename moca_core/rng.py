"""Randomness as an argument: a generator for a key, the same in every process and on every machine."""

import hashlib

import numpy as np


def seed_of(*key: str | int) -> int:
    """63-bit seed for a key such as (seed, epoch, document id, "mask")."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*key: str | int) -> np.random.Generator:
    return np.random.default_rng(seed_of(*key))
