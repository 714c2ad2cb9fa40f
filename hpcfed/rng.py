"""Randomness: every draw comes from (seed, purpose, ids...), never from a global stream.

A draw therefore does not depend on what was drawn before it, on which rank asks, or on how many
slots there are: this is what makes a run bit-identical for any number of slots.
"""

import hashlib

import numpy as np


def derive(seed: int, purpose: str, *ids: int | str) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(42, "dropout", round, client, rank)``."""
    key = "/".join(str(part) for part in (seed, purpose, *ids))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *ids: int | str) -> np.random.Generator:
    """A numpy generator for one purpose, see `derive`."""
    return np.random.Generator(np.random.PCG64(derive(seed, purpose, *ids)))
