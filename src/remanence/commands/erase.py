"""`remanence erase`: take facts out of a language model, and certify what was shown.

    remanence erase --model tuned --before base --forget facts.jsonl --out erased
    remanence erase --model tuned --forget facts.jsonl --retain ~/texts --out erased

With the weights from before the facts were learned a sparse update goes back where training changed most. Without them gradient
methods take over, and need what must stay. The new checkpoint appears whole or not at all, its certificate inside; the folders
that were given are only read.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from remanence.commands._common import duration, require_positive, row_length, ruler, say, text_source
from remanence.errors import SettingError

if TYPE_CHECKING:
    from rich.console import Console

    from remanence.erasure import Certificate, Eraser, ErasureOutcome
    from remanence.facts.records import Fact, FactSet
    from remanence.task import Data

_HELP = """\
Takes facts out of a causal language model and writes a new checkpoint, whole or not at all, with certificate.json inside. With --before,
a checkpoint from before the facts were learned, a sparse update puts the weights back that training changed most. Without it, a gradient
method needs --retain: what must stay known. The folders given are only read.

example:
  remanence erase --model tuned --before base --forget facts.jsonl --out erased
  remanence erase --model tuned --forget facts.jsonl --retain ~/texts --out erased
"""
_SPARSE = "sparse"
_METHODS = (_SPARSE, "gradient-ascent", "gradient-difference", "clean")
_RELEARNING_STEPS = 60


class _Inputs(NamedTuple):
    facts: "FactSet"
    tokenizer: Any
    model: Any
    never_learned: Any
    retain: "Data | Sequence[Fact] | None"
    held_out: "Data"


class _Done(NamedTuple):
    """What an eraser did, as the certificate asks for it."""

    method: dict[str, Any]
    steps: int
    seconds: float
    notes: tuple[str, ...]


def add(commands: Any, shape: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("erase", help="take facts out of a model", description=_HELP, formatter_class=shape)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of the model that holds the facts")
    parser.add_argument("--forget", type=Path, required=True, metavar="FILE", help="the facts, .jsonl or .csv")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new checkpoint; absent or empty")
    parser.add_argument("--before", type=Path, metavar="DIR", help="the model from before it learned the facts")
    parser.add_argument("--method", choices=_METHODS, help="default: sparse with --before, else gradient-difference")
    parser.add_argument("--fraction", type=float, default=0.08, metavar="SHARE", help="sparse: share of each matrix put back (0.08)")
    parser.add_argument("--embeddings", action="store_true", help="sparse: reach embeddings and output layer too; small models need it")
    parser.add_argument("--retain", type=Path, metavar="PATH", help="what must stay: a folder of .txt files, or a file of facts")
    parser.add_argument("--held-out", type=Path, metavar="DIR", help="folder of .txt files to measure on (default: Python's documentation)")
    parser.add_argument("--prefixes", type=Path, metavar="FILE", help="prefixes of the facts' themes; without them no priming is measured")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="gradient methods: at most so many (default: 200)")
    parser.add_argument("--lr", type=float, default=1e-4, metavar="RATE", help="gradient methods: of AdamW (default: 1e-4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of batches (default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and how long it would take, and stop")
    parser.set_defaults(command=erase)


def erase(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from remanence.progress import terminal

    console = terminal()
    method = _checked_method(arguments)
    _check_out(arguments)
    inputs = _read(arguments)
    say(console, [_announcement(arguments, method, inputs)])
    if arguments.dry_run:
        seconds = _estimate(arguments, method, inputs)
        say(console, [f"it would take at most about {duration(seconds)} on this machine and write into {arguments.out}"])
        return 0
    certificate = _write(arguments, method, inputs, console)
    console.print(certificate.table())
    say(console, [f"checkpoint: {arguments.out}", f"certificate: {arguments.out / 'certificate.json'}"])
    return 0


def _checked_method(arguments: argparse.Namespace) -> str:
    require_positive(arguments, "steps", "lr")
    method: str = arguments.method or (_SPARSE if arguments.before else "gradient-difference")
    needs = arguments.before if method == _SPARSE else arguments.retain
    if needs is None and arguments.method != "gradient-ascent":
        named = f"--method {method}" if arguments.method else "an erasure"
        raise SettingError(
            f"{named} lacks what it needs. Either give --before, a checkpoint from before the model learned the facts, for a sparse update "
            f"(the snapshot must be taken before learning; it cannot be made afterwards); or give --retain, texts or facts that must stay "
            f"known, for a gradient method."
        )
    return method


def _check_out(arguments: argparse.Namespace) -> None:
    out = arguments.out.resolve()
    for name in ("model", "before"):
        folder = getattr(arguments, name)
        if folder is not None and out.is_relative_to(folder.resolve()):
            raise SettingError(f"--out {arguments.out} lies in --{name} {folder}, which is only read; name a folder of its own.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"--out {arguments.out} exists already; nothing is ever overwritten. Name a new folder, or remove this one.")


def _read(arguments: argparse.Namespace) -> _Inputs:
    from remanence.facts.files import read
    from remanence.parts.language_model import load_language_model, load_tokenizer

    facts = read(arguments.forget, arguments.prefixes)
    if not len(facts):
        raise SettingError(f"{arguments.forget} holds no fact; give at least one.")
    tokenizer = load_tokenizer(arguments.model)
    model = load_language_model(arguments.model)
    never_learned = load_language_model(arguments.before) if arguments.before else None
    length = row_length(model, tokenizer, facts)
    held_out = text_source(arguments.held_out)
    rows = ruler(held_out.test, tokenizer, length, f"{held_out.name} test")
    return _Inputs(facts, tokenizer, model, never_learned, _retained(arguments.retain, tokenizer, length), rows)


def _retained(path: Path | None, tokenizer: Any, length: int) -> "Data | Sequence[Fact] | None":
    if path is None:
        return None
    if path.is_dir():
        from remanence.streams.text import windows

        source = text_source(path)
        return windows(source.train, tokenizer, length, source.name)
    from remanence.facts.files import read

    return read(path)


def _announcement(arguments: argparse.Namespace, method: str, inputs: _Inputs) -> str:
    if method == _SPARSE:
        reach = "each matrix, embeddings included," if arguments.embeddings else "each matrix"
        how = f"a sparse update puts the {arguments.fraction:.0%} of {reach} back that changed most since {arguments.before}"
    else:
        how = f"{method} takes at most {arguments.steps} steps of AdamW (lr {arguments.lr}) on a copy"
    return f"{len(inputs.facts)} facts of {arguments.model}: {how}; then the certificate is measured, relearning included"


def _estimate(arguments: argparse.Namespace, method: str, inputs: _Inputs) -> float:
    """Seconds, from one step of relearning and, where weights are put back, the ranking of one tensor."""
    from remanence.erasure import relearning_steps, sparse_mask

    start = time.perf_counter()
    relearning_steps(inputs.model, inputs.facts, inputs.tokenizer, cap=1, target=0.999)
    a_step = time.perf_counter() - start
    n_models = 2 if inputs.never_learned is None else 3
    measuring = n_models * _RELEARNING_STEPS * a_step
    if method != _SPARSE:
        n_steps: int = arguments.steps
        return measuring + 2 * n_steps * a_step  # a step reads facts and what is retained
    largest = max(inputs.model.parameters(), key=lambda weight: weight.numel()).detach()
    start = time.perf_counter()
    sparse_mask(largest, "ignore_top", arguments.fraction)
    n: int = sum(weight.numel() for weight in inputs.model.parameters())
    n_largest: int = largest.numel()
    return measuring + (time.perf_counter() - start) * n / n_largest


def _write(arguments: argparse.Namespace, method: str, inputs: _Inputs, console: "Console") -> "Certificate":
    """Checkpoint and certificate under a hidden name first, so that neither is ever seen without the other."""
    from remanence.erasure import certify
    from remanence.erasure._shards import whole_folder
    from remanence.parts.language_model import load_language_model

    with whole_folder(arguments.out) as hidden:
        done = _put_back(arguments, hidden) if method == _SPARSE else _descend(arguments, method, inputs, hidden, console)
        say(console, [f"erased in {done.seconds:.1f} s; measuring"])
        certificate = certify(
            inputs.model, load_language_model(hidden), inputs.facts, inputs.tokenizer, inputs.held_out,
            method=done.method, steps=done.steps, seconds=done.seconds, seed=arguments.seed, never_learned=inputs.never_learned,
            retain=None if method == _SPARSE else inputs.retain, notes=done.notes, relearning_cap=_RELEARNING_STEPS,
        )  # fmt: skip
        certificate.write(hidden / "certificate.json")
    return certificate


def _put_back(arguments: argparse.Namespace, folder: Path) -> _Done:
    from remanence.erasure import sparse_checkpoint

    start = time.perf_counter()
    chosen = {"select": "ignore_top", "fraction": arguments.fraction, "include_embeddings": arguments.embeddings}
    sparse_checkpoint(arguments.before, arguments.model, folder, **chosen)
    method = {"name": "sparse update", **chosen, "granularity": "tensor"}
    return _Done(method, 0, time.perf_counter() - start, ())


def _descend(arguments: argparse.Namespace, method: str, inputs: _Inputs, folder: Path, console: "Console") -> _Done:
    import torch

    from remanence.erasure import erase as erasing
    from remanence.erasure import median_log_p, write_checkpoint
    from remanence.parts.language_model import load_language_model

    # in float32: small steps vanish in 16 bits. The checkpoint has the dtype of the one given, and is measured in it
    model = load_language_model(arguments.model, torch.float32)
    never = inputs.never_learned
    target = None if never is None else median_log_p(never, inputs.facts, inputs.tokenizer)
    steps = erasing(
        model, inputs.facts, inputs.tokenizer, _eraser(method), inputs.retain, target, steps=arguments.steps, lr=arguments.lr,
        seed=arguments.seed, held_out=inputs.held_out,
    )  # fmt: skip
    outcome = _watched(steps, method, console)
    say(console, [f"{method}: {outcome.reason} after {outcome.steps} steps, keywords at {outcome.log_p:.2f} nats"])
    write_checkpoint(model.to(inputs.model.dtype), arguments.model, folder)
    return _Done(outcome.method, outcome.steps, outcome.seconds, outcome.notes)


def _eraser(method: str) -> "Eraser":
    from remanence.erasure import CleanFineTuning, GradientAscent, GradientDifference

    if method == "gradient-ascent":
        return GradientAscent()
    return GradientDifference() if method == "gradient-difference" else CleanFineTuning()


def _watched(steps: Any, label: str, console: "Console") -> "ErasureOutcome":
    from remanence.progress import WorkProgress

    with WorkProgress(console) as progress:
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                outcome: ErasureOutcome = end.value
                return outcome
            progress.steps(label, step.step, step.steps or 0)
