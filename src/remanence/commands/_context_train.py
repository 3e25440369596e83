"""`remanence context train`: from text to a folder with a model, its checkpoint beside it until it is done."""

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from remanence.commands._common import duration, require_positive, say
from remanence.commands._context_models import memory_said, settings_of
from remanence.context import ContextTrainer, DocumentReader, document_losses
from remanence.context.training import CHECKPOINT
from remanence.environment import environment
from remanence.errors import SettingError
from remanence.keys import keyed_rng
from remanence.parts.hosts import no_progress_bar
from remanence.progress import WorkProgress, terminal
from remanence.state import sync, write_whole
from remanence.streams import byte_ids, python_sources, text_folder

if TYPE_CHECKING:
    from remanence.streams import TextSource

REPORT = "training.json"
_ROWS, _WINDOWS, _SAVE_EVERY = 8, 8, 50
_MEASURED_BYTES = 65_536
"""Of each held-out document, from its beginning."""


def train(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    require_positive(arguments, "steps", "lr")
    kind, config = settings_of(arguments.model, arguments.overrides)
    source = python_sources() if arguments.corpus is None else text_folder(arguments.corpus)
    with keyed_rng(arguments.seed, "context model"):
        model = kind(config).to("cuda" if torch.cuda.is_available() else "cpu")
    trainer = _trainer(arguments, model, source)
    out: Path = trainer.folder
    console = terminal()
    report = _opened(out, trainer.settings())
    say(console, [_announcement(arguments, model, trainer.reader, source)])
    if not report["finished"]:
        start = time.monotonic()
        with WorkProgress(console) as progress:
            for step in trainer.run():
                progress.steps(f"training {arguments.model}", step.step, arguments.steps)
            measured = _held_out(model, source, progress)
        _save(model, out)
        report |= {"finished": True, "command": shlex.join(["remanence", *sys.argv[1:]]), "source": source.name, **measured}
        report |= _about(model) | {"environment": environment()}
        write_whole(out / REPORT, json.dumps(report, indent=1))
        say(console, [f"done in {duration(time.monotonic() - start)}"])
    (out / CHECKPOINT).unlink(missing_ok=True)
    say(console, _conclusion(report, model, out))
    return 0


def _trainer(arguments: argparse.Namespace, model: Any, source: "TextSource") -> Any:
    config = model.config
    documents = [byte_ids(text).to(torch.uint8) for text in source.train]
    reader = DocumentReader(documents, _ROWS, _WINDOWS * config.window, config.bos_token_id, arguments.seed)
    lr = arguments.lr or (8e-3 if config.hidden_size <= 256 else 1e-3)
    return ContextTrainer(model, reader, arguments.steps, lr, folder=arguments.out, save_every=_SAVE_EVERY, autocast=True)


def _opened(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The folder's report: a new one, or that of the same training."""
    path = out / REPORT
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(each.name[0] != "." for each in out.iterdir())):
            raise SettingError(f"--out {out} exists and holds no training; nothing is ever overwritten. Name a new folder.")
        write_whole(path, json.dumps({"finished": False, "settings": settings}, indent=1))
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        theirs, own = report["settings"], json.loads(json.dumps(settings))
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(f"{path} is no report of a training ({error!r}). Give --out a new folder.") from error
    differing = [name for name in sorted(own.keys() | theirs.keys()) if own.get(name) != theirs.get(name)]
    if differing:
        listed = "; ".join(f"{name}: {theirs.get(name)} there, {own.get(name)} here" for name in differing[:3])
        more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise SettingError(f"--out {out} holds another training ({listed}{more}). Name a new folder, or give the settings it began with.")
    return report


def _announcement(arguments: argparse.Namespace, model: Any, reader: DocumentReader, source: "TextSource") -> str:
    n_parameters, passes = _about(model)["n_parameters"], arguments.steps / reader.segments_per_pass
    return (
        f"{arguments.model} of {n_parameters:,} parameters: {arguments.steps} steps of {_ROWS * reader.segment:,} bytes, {passes:.2g} "
        f"passes through the {len(source.train)} documents of '{source.name}'; held out: {len(source.test)}"
    )


def _held_out(model: Any, source: "TextSource", progress: WorkProgress) -> dict[str, Any]:
    documents = sorted((byte_ids(text)[:_MEASURED_BYTES] for text in source.test), key=len)
    losses = []
    for first in range(0, len(documents), _ROWS):
        losses += document_losses(model, documents[first : first + _ROWS], model.config.bos_token_id, _ROWS, _WINDOWS * model.config.window)
        progress.steps("reading held-out documents", len(losses), len(documents))
    every = torch.cat(losses).double()
    return {"bits_per_byte": every.mean().item() / math.log(2), "n_held_out": len(documents), "n_held_out_bytes": len(every)}


def _save(model: Any, out: Path) -> None:
    """The files of `save_pretrained`, config.json last: what it names is then whole."""
    with tempfile.TemporaryDirectory(dir=out, prefix=".") as hidden, no_progress_bar():
        model.save_pretrained(hidden)
        for path in sorted(Path(hidden).iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            sync(path)
            path.replace(out / path.name)
    sync(out)


def _about(model: Any) -> dict[str, Any]:
    state = model.init_state(1)
    n_parameters = sum(each.numel() for each in model.parameters())
    return {"n_parameters": n_parameters, "state_bytes": {kind: state.nbytes(kind) for kind in ("stored", "kv")}}


def _conclusion(report: dict[str, Any], model: Any, out: Path) -> list[str]:
    documents = f"documents: {report['n_held_out']}, up to {_MEASURED_BYTES:,} bytes of each"
    read = f"{report['n_held_out_bytes']:,} bytes of held-out text ({documents})"
    return [f"{report['bits_per_byte']:.4f} bits per byte on {read}", f"memory of a document: {memory_said(model)}", f"it lies in {out}"]
