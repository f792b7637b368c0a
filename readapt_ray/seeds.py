"""Derive the seeds of random draws in one place, so that no two uses share draws.

Adding a step number to a seed makes step 0 of seed 1 draw what step 1 of seed 0 draws, and NumPy takes [seed], [seed, 0]
and [seed, 0, 0] for the same seed. A hash of all parts has neither fault.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, stream: str, *indexes: int) -> int:
    """Return the seed of one use of randomness, from 0 to 2^63 - 1.

    Args:
        seed: the user's.
        stream: what the draws are for, such as "dropout"; other streams draw independently.
        indexes: which draw of the stream it is, such as step and worker.
    """
    key = "/".join([stream, *map(str, (seed, *indexes))])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") >> 1


def random_generator(seed: int, stream: str, *indexes: int) -> np.random.Generator:
    """Return a NumPy generator seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(seed, stream, *indexes))
