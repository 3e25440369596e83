"""Causal language models from a folder, and their loss per token.

Any `transformers` causal LM that `save_pretrained` wrote will do; nothing is ever fetched. The losses also take any module
that maps ids to logits. Everything is measured in nats per token, with the softmax in float32 whatever the weights' dtype.

Axes: N windows; B batch; T tokens; V vocabulary.

Example:
    >>> from remanence.task import Data
    >>> model = torch.nn.Embedding(8, 8)  # a bigram table: ids (B, T) -> logits (B, T, V)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> ids = torch.arange(6).view(2, 3)
    >>> round(held_out_loss(model, Data(ids, ids + 1, torch.arange(2))), 4)  # log 8: it knows nothing
    2.0794
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.keys import keyed_rng
from remanence.parts.hosts import no_progress_bar
from remanence.task import Data

IGNORED = -100
"""Target that no loss counts; so does any other negative one."""


def load_language_model(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A causal LM from a folder, in evaluation mode, on the CPU.

    Args:
        folder: what `save_pretrained` wrote: config.json and weights; "~" is understood.
        dtype: of the weights; None keeps the folder's own.

    Returns:
        A `transformers` model with a head over the vocabulary.

    Raises:
        DataError: the folder, its config.json or its weights are absent or broken.
        SettingError: the folder holds another kind of model.
    """
    folder = Path(folder).expanduser()
    kind = _model_type(folder)
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SettingError(f"{folder} holds a '{kind}' model, which is no causal language model. Give a GPT-2, Llama or the like.")
    try:
        with no_progress_bar():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=dtype or "auto", output_loading_info=True
            )
    except ImportError as error:  # a quantised model whose kernels are not installed
        raise SettingError(f"{folder} needs a package that is not installed: {error}") from error
    except Exception as error:  # safetensors, json and transformers each have errors of their own for broken weights
        raise DataError(f"the model in {folder} cannot be read ({type(error).__name__}: {error}). Save it anew.") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise SettingError(
            f"{folder} lacks {len(missing)} tensors of a causal '{kind}' model (first three: {missing[:3]}); they would be random. "
            f"It was saved from another kind of model: give a folder saved from a causal LM."
        )
    return model.eval()


def _model_type(folder: Path) -> str:
    path = folder / "config.json"
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder.absolute()}; give a folder that save_pretrained of a causal language model wrote.")
    if not path.exists():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise DataError(f"{folder} has no config.json (found: {found}). Give a folder that save_pretrained of a causal LM wrote.")
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a JSON object ({error}). Save the model anew with save_pretrained.") from error


def is_quantised(model: nn.Module) -> bool:
    """Whether weights are stored in fewer bits than a float, so that adding to them has no meaning."""
    config = getattr(model, "config", None)
    return bool(
        getattr(model, "is_quantized", False)
        or getattr(config, "quantization_config", None)
        or any(not parameter.is_floating_point() for parameter in model.parameters())
    )


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer beside a language model.

    Args:
        folder: what `save_pretrained` of a tokenizer wrote; a lone tokenizer.json (of `tokenizers`) will do, its EOS then is
            the one that config.json names.

    Returns:
        A `transformers` tokenizer.

    Raises:
        DataError: the folder is absent, or holds no tokenizer that can be read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder.absolute()}; give a folder that save_pretrained of a tokenizer wrote.")
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        return _bare_tokenizer(folder)
    from transformers import AutoTokenizer

    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    advice = "Save it there with tokenizer.save_pretrained, or put its tokenizer.json there."
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a missing file is an OSError, TypeError or ValueError, depending on the family
        raise DataError(f"no tokenizer can be read from {folder} (found: {found}; {type(error).__name__}: {error}). {advice}") from error
    files = {"tekken.json", "tokenizer.json", *tokenizer.vocab_files_names.values()}
    if tokenizer.vocab_files_names and not any((folder / name).exists() for name in files):
        # transformers guessed a class from config.json and gave it an empty vocabulary
        raise DataError(f"{folder} has no file of a tokenizer (found: {found}). {advice}")
    return tokenizer


def _bare_tokenizer(folder: Path) -> Any:
    """AutoTokenizer would guess a class from config.json and rebuild a word-level vocabulary as that family's BPE."""
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise DataError(f"{folder / 'tokenizer.json'} cannot be read ({error}). Save the tokenizer anew.") from error
    config = json.loads(path.read_text(encoding="utf-8")) if (path := folder / "config.json").exists() else {}
    ids = config.get("eos_token_id")
    eos = ids[0] if isinstance(ids, list) and ids else ids
    if isinstance(eos, int) and eos < len(tokenizer):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    return tokenizer


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """(B, T, V) logits of ids (B, T), from a `transformers` model or from any module that returns them."""
    # without it a transformers model fills a cache of keys and values that nobody reads
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    output = model(inputs, **options)
    # a model that carries a state returns it behind the logits, as transformers' models do with return_dict=False
    logits: Tensor = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
    return logits


def row_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """(B,) log-probability of each row's targets that are 0 or above, summed, in float32; -inf for one that has no column.

    Args:
        logits: (B, T, V).
        targets: (B, T) int64, on the same device.
    """
    log_p = logits.float().log_softmax(-1)
    found = log_p.gather(-1, targets.clamp(0, log_p.shape[-1] - 1)[..., None])[..., 0]
    return torch.where(targets < log_p.shape[-1], found, -torch.inf).masked_fill(targets < 0, 0.0).sum(-1)


def require_token_windows(data: Data, name: str, vocabulary: int | None) -> None:
    """Refuse a table that is not windows of ids.

    Args:
        data: inputs and targets (N, T), integers.
        name: of the task, for the message.
        vocabulary: V, how many ids the model knows; None where that is not known.

    Raises:
        DataError: shapes differ, ids are floats, or lie outside 0 .. V - 1.
    """
    if data.inputs.dim() != 2 or data.inputs.shape != data.targets.shape or data.inputs.is_floating_point():
        shapes = f"inputs {tuple(data.inputs.shape)} of {data.inputs.dtype}, targets {tuple(data.targets.shape)}"
        raise DataError(f"task '{name}': a language learner takes windows of ids, inputs and targets (N, T); got {shapes}.")
    if vocabulary is not None and data.inputs.numel():
        low, high = int(data.inputs.min()), max(int(data.inputs.max()), int(data.targets.max()))
        if low < 0 or high >= vocabulary:
            raise DataError(f"task '{name}' has ids {low} to {high}, the model knows 0 to {vocabulary - 1}; use the model's tokenizer.")


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss per target; targets are what follows each input, so nothing is shifted here.

    Args:
        inputs: (B, T) int64 ids.
        targets: (B, T) int64 ids; negative ones (padding) are not counted.

    Returns:
        Scalar, nats per counted target, float32, differentiable.

    Raises:
        DataError: no target is to be counted, or logits and targets differ in (B, T).
    """
    total, n = _summed_loss(model, inputs, targets)
    if n == 0:
        raise DataError(f"none of the {targets.numel()} targets is 0 or above, so there is no loss; give windows with at least one target.")
    return total / n


def _summed_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    logits = logits_of(model, inputs)
    if logits.shape[:-1] != targets.shape:
        raise DataError(f"logits of shape {tuple(logits.shape)} do not answer targets of shape {tuple(targets.shape)}, one row a target.")
    is_counted = targets >= 0
    labels = targets.masked_fill(~is_counted, IGNORED).flatten()
    total = F.cross_entropy(logits.flatten(0, -2).float(), labels, ignore_index=IGNORED, reduction="sum")
    return total, int(is_counted.sum())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module's mode, and the random state, are as before."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad(), keyed_rng("evaluating"):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def held_out_loss(model: nn.Module, data: Data, batch_size: int = 32) -> float:
    """Nats per token over all targets of a table; the model's mode and all random states are left as they were.

    Args:
        data: windows: inputs (N, T), targets (N, T), as `remanence.streams.windows` makes them.
        batch_size: windows per forward pass; the logits take batch_size x T x V x 4 bytes.

    Raises:
        DataError: there is nothing to predict.
        SettingError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise SettingError(f"batch_size: {batch_size}; give 1 or more.")
    device = next((parameter.device for parameter in model.parameters()), data.inputs.device)
    total, n_targets = 0.0, 0
    with evaluating(model):
        for inputs, targets in zip(torch.split(data.inputs, batch_size), torch.split(data.targets, batch_size), strict=True):
            if len(inputs):
                loss, n = _summed_loss(model, inputs.to(device), targets.to(device))
                total, n_targets = total + loss.item(), n_targets + n
    if n_targets == 0:
        raise DataError(f"{len(data)} windows without a single target have no loss; give windows of text.")
    return total / n_targets
