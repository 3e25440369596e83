"""Fingerprints of what goes into a certificate: models, tokenizers, facts, tables.

All are sha256 in hex. They depend on contents alone: not on the device, the folder, or the order in which names were added.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remanence.facts.records import Fact, FactSet
from remanence.task import Data


def model_hash(model: nn.Module) -> str:
    """Of the state's names, dtypes, shapes and bits; of tied weights the alphabetically first name counts.

    Example:
        >>> model_hash(nn.Linear(2, 2)) == model_hash(nn.Linear(2, 2))  # two draws of random weights
        False
    """
    seen: set[tuple[Any, ...]] = set()
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.device, tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        _add(digest, tensor)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Of all that turns text into ids: the whole pipeline of a fast tokenizer, class and vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: dict[str, Any] = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = json.loads(backend.to_str())
        # state of the last call, not of the tokenizer
        content |= {"padding": None, "truncation": None}
    content["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _of_json(content)


def data_hash(data: Data | Sequence[Fact]) -> str:
    """Of a table's inputs and targets, or of facts (and the prefixes of a set), in their order."""
    if isinstance(data, Data):
        digest = hashlib.sha256()
        for tensor in (data.inputs, data.targets):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
            _add(digest, tensor)
        return digest.hexdigest()
    facts = [[fact.id, fact.theme, fact.kind, fact.text, fact.keyword, fact.context, fact.subject] for fact in data]
    prefixes = [[each.theme, each.prefix, each.subject] for each in data.prefixes] if isinstance(data, FactSet) else []
    return _of_json([facts, prefixes])


def _of_json(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    for part in _parts(tensor.detach().cpu().contiguous().flatten()):
        digest.update(part.view(torch.uint8).numpy())


def _parts(flat: Tensor) -> Iterable[Tensor]:
    return torch.split(flat, 1 << 24) if flat.numel() else ()
