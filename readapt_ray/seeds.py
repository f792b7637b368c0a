"""Derive independent random seeds for each use of randomness.

Seeds are hashes. Adding a step number to a seed would give step 0 of seed 1 the same draws as step 1 of seed 0. And NumPy
treats [seed], [seed, 0] and [seed, 0, 0] as the same seed. A hash of all parts has neither problem.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, stream: str, *indexes: int) -> int:
    """Return the seed of one use of randomness, from 0 to 2^63 - 1.

    Args:
        seed: the user's seed.
        stream: what the draws are for, such as "dropout". Different streams are independent.
        indexes: position within the stream, such as step and worker.
    """
    key = "/".join([stream, *map(str, (seed, *indexes))])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def random_generator(seed: int, stream: str, *indexes: int) -> np.random.Generator:
    """Return a NumPy generator whose seed is `derive_seed` of the same arguments."""
    return np.random.default_rng(derive_seed(seed, stream, *indexes))
