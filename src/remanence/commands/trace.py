"""`remanence trace`: what will training on these texts do to a language model? The forecast first, then the measurement beside it.

    remanence trace --model gpt2-folder --facts facts.jsonl --prefixes prefixes.jsonl

The model's folder is only read. A copy is warmed up on clean text, shown the facts, and trained on clean text again; a paired run sees
the same batches without the facts. Facts of one theme would prime each other, so they take turns: one of each theme a run, and each run
begins at the same warmed-up weights. Finished runs stay in the folder of results, and the same command goes on behind them.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.commands._common import duration, require_positive, row_length, ruler, say, text_source
from remanence.errors import SettingError

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from remanence.commands._groups import TraceRuns, TraceSettings
    from remanence.facts.records import FactSet
    from remanence.streams.text import TextSource

_HELP = """\
Prints how strongly each fact is likely to prime, from the untouched model alone: the less probable its keyword, the more. Then trains
a copy of the model on clean text with the facts spliced in, measures memory, priming and retention over the steps against a paired run
without the facts, and prints both side by side. Writes trace.csv, summary.json and report.html. The model's folder is only read. The
same command resumes a trace that was interrupted.

example:
  remanence trace --model small-lm --facts facts.jsonl --forecast-only
  remanence trace --model small-lm --facts facts.jsonl --prefixes prefixes.jsonl --corpus ~/texts
"""


def add(commands: Any, shape: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("trace", help="forecast and trace facts", description=_HELP, formatter_class=shape)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a causal language model and its tokenizer")
    parser.add_argument("--facts", type=Path, required=True, metavar="FILE", help="facts, .jsonl or .csv")
    parser.add_argument("--prefixes", type=Path, metavar="FILE", help="prefixes of the facts' themes; without them no priming is measured")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="folder of .txt files to train on (default: Python's documentation)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results (default: runs/trace-NAME-HASH)")
    parser.add_argument("--times", type=int, default=20, metavar="N", help="exposures of each fact (default: 20)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="steps from one exposure to the next (default: 1)")
    parser.add_argument("--clean-steps", type=int, default=200, metavar="N", help="steps after the last exposure (default: 200)")
    parser.add_argument("--lr", type=float, default=3e-4, metavar="RATE", help="learning rate of AdamW (default: 3e-4)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows of a step (default: 16)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a row (default: what facts need, 40 to 128)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of batches (default: 0)")
    parser.add_argument("--forecast-only", action="store_true", help="print the forecast and stop")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and how long it would take, and stop")
    parser.set_defaults(command=trace)


def trace(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from remanence.commands._measured import forecast_table
    from remanence.probes.forecast import forecast
    from remanence.progress import terminal

    require_positive(arguments, "times", "every", "clean_steps", "batch_size", "lr", "length")
    console = terminal()
    model, tokenizer, facts = _load(arguments)
    length = arguments.length or row_length(model, tokenizer, facts)
    notes = _notes(facts, tokenizer, length)
    say(console, [f"note: {note}" for note in notes])
    if not arguments.dry_run:
        said = forecast(model, facts, tokenizer)
        console.print(forecast_table(said))
        if arguments.forecast_only:
            return 0
    source = text_source(arguments.corpus)
    rehearsed = _rehearsed(facts, source)
    say(console, [f"note: {note}" for note in rehearsed])
    runs = _runs(arguments, length, model, tokenizer, facts, source)
    plan = _plan(arguments, runs, source)
    folder = arguments.out or Path("runs") / f"trace-{arguments.facts.name.split('.')[0]}-{plan['hash']}"
    say(console, _announcement(runs, source))
    if arguments.dry_run:
        say(console, [f"it would take about {duration(runs.seconds())} on this machine and write into {folder}"])
        return 0
    start = time.monotonic()
    curves, held_out = _measure(runs, folder, plan, console)
    _conclude(folder, plan, said, curves, held_out, [*notes, *rehearsed], console)
    say(console, [f"done in {time.monotonic() - start:.0f} s"])
    return 0


def _load(arguments: argparse.Namespace) -> "tuple[Any, Any, FactSet]":
    """Model, tokenizer and facts; what is quick to read is read first."""
    import torch

    from remanence.facts.files import read
    from remanence.parts.language_model import load_language_model, load_tokenizer

    facts = read(arguments.facts, arguments.prefixes)
    if not len(facts):
        raise SettingError(f"{arguments.facts} holds no fact; give at least one.")
    tokenizer = load_tokenizer(arguments.model)
    # in 16 bits most of a small step would be rounded away
    model = load_language_model(arguments.model, torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, facts


def _notes(facts: "FactSet", tokenizer: Any, length: int) -> list[str]:
    if not facts.prefixes:
        return ["no --prefixes were given, so that memory is measured and priming is not"]
    from remanence.facts.validation import validate

    return validate(facts, tokenizer, length + 1)  # a row of T predicted tokens holds T + 1


def _rehearsed(facts: "FactSet", source: "TextSource") -> list[str]:
    from remanence.facts.rehearsals import rehearsals

    found = {name: count for name, count in rehearsals(facts, source.train).items() if count}
    if not found:
        return []
    return [f"the corpus itself states {len(found)} of the facts ({', '.join(list(found)[:3])}): their retention is not decay alone"]


def _runs(
    arguments: argparse.Namespace, length: int, model: Any, tokenizer: Any, facts: "FactSet", source: "TextSource"
) -> "TraceRuns":
    from remanence.commands._groups import TraceRuns, TraceSettings
    from remanence.streams.text import windows

    settings = TraceSettings(
        arguments.every, arguments.times, arguments.clean_steps, arguments.lr, arguments.batch_size, length, arguments.seed
    )
    train = windows(source.train, tokenizer, length, source.name)
    held_out = ruler(source.test, tokenizer, length, f"{source.name} test")
    return TraceRuns(model, tokenizer, facts, train, held_out, settings)


def _plan(arguments: argparse.Namespace, runs: "TraceRuns", source: "TextSource") -> dict[str, Any]:
    """All that the numbers depend on, by value or by fingerprint."""
    import hashlib

    from remanence.erasure.hashes import data_hash, model_hash, tokenizer_hash

    settings: TraceSettings = runs.settings
    plan = {
        "model": model_hash(runs.model),
        "tokenizer": tokenizer_hash(runs.tokenizer),
        "facts": data_hash(runs.facts),
        "prefixes": hashlib.sha256(repr(runs.facts.prefixes).encode()).hexdigest(),
        "corpus": source.fingerprint(),
        **asdict(settings),
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:12]
    return {"hash": digest, "name": arguments.model.resolve().name, "command": shlex.join(["remanence", *sys.argv[1:]]), **plan}


def _announcement(runs: "TraceRuns", source: "TextSource") -> list[str]:
    from remanence.commands._groups import WARM_STEPS

    settings, n = runs.settings, len(runs.groups)
    each = f"{settings.n_steps} steps a run ({settings.times} exposures of each fact, {settings.clean_steps} clean steps after the last)"
    runs_said = "one run" if n == 1 else f"{n} runs, one fact of each theme a run, each from the same start"
    return [
        f"{len(runs.facts)} facts of {len(runs.facts.themes)} themes: {runs_said}; and a paired control run without facts",
        f"a copy is trained on '{source.name}' with a fresh AdamW (lr {settings.lr}): {WARM_STEPS} clean steps to warm up, then {each}",
    ]


def _measure(runs: "TraceRuns", folder: Path, plan: dict[str, Any], console: "Console") -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Curves of all groups with their control, and all held-out losses; runs on disk are not repeated."""
    import pandas as pd

    from remanence.commands._finished import finished, keep, open_folder
    from remanence.commands._measured import with_control
    from remanence.progress import WorkProgress

    open_folder(folder, plan)
    curves, losses = [], []
    names = ["control", *(f"group-{number}" for number in range(len(runs.groups)))]
    with WorkProgress(console) as progress:
        for number, name in enumerate(names):
            found = finished(folder, name)
            if found is None:
                label = f"run {number + 1} of {len(names)} ({name})"

                def report(done: int, total: int, label: str = label) -> None:
                    progress.steps(label, done, total)

                tables = runs.control(report) if number == 0 else runs.group(number - 1, report)
                keep(folder, name, *tables)
                found = finished(folder, name)
                assert found is not None
            curves.append(found[0])
            losses.append(found[1].assign(run=name))
    return with_control(pd.concat(curves[1:], ignore_index=True), curves[0]), pd.concat(losses, ignore_index=True)


def _conclude(
    folder: Path,
    plan: dict[str, Any],
    said: "pd.DataFrame",
    curves: "pd.DataFrame",
    held_out: "pd.DataFrame",
    notes: list[str],
    console: "Console",
) -> None:
    """The tables on the terminal, and the three files."""
    from remanence.commands._measured import agreement, by_fact, measured_table
    from remanence.environment import environment
    from remanence.report.trace_page import write_trace_page
    from remanence.state import write_whole

    table = by_fact(curves, said)
    console.print(measured_table(table))
    found = agreement(table)
    if found is not None:
        line = f"Spearman of log p before and priming: {found.spearman:.2f} [{found.low:.2f}, {found.high:.2f}], {found.n} facts, one seed"
        notes = [*notes, line]
        say(console, [line])
    write_whole(folder / "trace.csv", curves.to_csv(index=False))
    summary = {**plan, "notes": notes, "spearman": None if found is None else _without_nan(found._asdict(), drop="coverage")}
    summary |= {"forecast": _records(said), "facts_measured": _records(table), "held_out": _records(held_out)}
    summary["environment"] = environment()
    write_whole(folder / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    page = write_trace_page(folder / "report.html", curves, table, summary)
    console.print(f"report: {page}", soft_wrap=True, highlight=False)


def _records(table: "pd.DataFrame") -> list[dict[str, Any]]:
    # pandas writes what JSON can read: NaN becomes null
    records: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return records


def _without_nan(values: dict[str, Any], drop: str) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in values.items() if name != drop}
