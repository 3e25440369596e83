"""Keyed randomness: a random choice is a pure function of its key, so nothing random is ever stored.

Step k of a verb on a task draws from `generator(seed, verb, task, k)`. A run that resumes at step k needs to know
only those four values, and two runs with the same seed agree whether or not one of them was interrupted.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Key = str | int | float | bool | None


def key_seed(*key: Key) -> int:
    """A 63-bit seed from a key; the same on every platform and in every process.

    Example:
        >>> key_seed(0, "learn", "a", 1) == key_seed(0, "learn", "a", 1)
        True
        >>> key_seed(0, "ab", "c") == key_seed(0, "a", "bc")
        False
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: Key) -> torch.Generator:
    """A CPU generator seeded by the key."""
    return torch.Generator().manual_seed(key_seed(*key))


@contextmanager
def keyed_rng(*key: Key) -> Iterator[None]:
    """Seed the global generators for code that takes none (dropout, peft's initialisation) and restore them after.

    Never hold it open across a `yield` of a generator: the caller would run under our seed.
    `torch.manual_seed` is avoided: it visits every backend and costs a hundred times more.
    """
    seed = key_seed(*key)
    before = torch.default_generator.get_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    torch.default_generator.manual_seed(seed)
    if cuda is not None:
        torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
