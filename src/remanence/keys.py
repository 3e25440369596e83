"""Keyed randomness: a random choice is a pure function of its key, so nothing random is ever stored.

Step k of a verb on a task draws from `generator(seed, verb, task, k)`. A run that resumes at step k needs to know
only those four values, and two runs with the same seed agree whether or not one of them was interrupted.
"""

import hashlib
import json
from json.encoder import encode_basestring_ascii

import torch
from torch import Tensor

Key = str | int | float | bool | None


def key_seed(*key: Key) -> int:
    """A 63-bit seed from a key; the same on every platform and in every process.

    Example:
        >>> key_seed(0, "learn", "a", 1) == key_seed(0, "learn", "a", 1)
        True
        >>> key_seed(0, "ab", "c") == key_seed(0, "a", "bc")
        False
    """
    # json.dumps(key), spelled out for the parts that nearly every key is made of: this runs at every step
    words = [encode_basestring_ascii(part) if type(part) is str else str(part) if type(part) is int else json.dumps(part) for part in key]
    digest = hashlib.blake2b(f"[{', '.join(words)}]".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: Key) -> torch.Generator:
    """A CPU generator seeded by the key."""
    return torch.Generator().manual_seed(key_seed(*key))


class keyed_rng:  # noqa: N801 - used as a function
    """Seed the global generators for code that takes none (dropout, peft's initialisation) and restore them after.

    Never hold it open across a `yield` of a generator: the caller would run under our seed.
    `torch.manual_seed` is avoided: it visits every backend and costs a hundred times more.
    """

    __slots__ = ("_cpu", "_cuda", "_key")

    def __init__(self, *key: Key) -> None:
        self._key = key
        self._cuda: Tensor | None = None

    def __enter__(self) -> None:
        seed = key_seed(*self._key)
        self._cpu = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._cuda = torch.cuda.get_rng_state()
            torch.cuda.manual_seed(seed)

    def __exit__(self, *error: object) -> None:
        torch.default_generator.set_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
