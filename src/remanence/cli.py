"""The command line: run and compare recipes, report, meta-train, trace and erase facts, read long documents, list what there is."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from remanence.commands import context, erase, meta_train, trace
from remanence.commands._common import overrides
from remanence.errors import CellBusy, NonFiniteLoss, NotDeterministic, RecipeError, RemanenceError

if TYPE_CHECKING:
    from rich.console import Console

    from remanence.recipe import Recipe

_RUN_HELP = """\
Checks the whole recipe before any training, builds its artifacts once, runs its cells in parallel processes of one
thread each, prints the five-verb table and writes report.html into the run folder. The same command resumes a run that
was interrupted.

example:
  remanence run digits
  remanence run digits --set seeds=[0,1,2] --set learners.replay.budget_bytes=27200
  remanence run images --set sources.images.path=~/pictures
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; exits 0 only when the command's work is done, 2 on wrong input, 1 on failure, 130 on Ctrl-C."""
    parsed = _parser().parse_args(arguments)
    try:
        sys.exit(parsed.command(parsed))
    except (CellBusy, NonFiniteLoss, NotDeterministic) as error:
        _complain(error, 1)
    except RemanenceError as error:
        _complain(error, 2)
    except KeyboardInterrupt:
        print("remanence: interrupted; the same command goes on from here.", file=sys.stderr)
        sys.exit(130)


def _complain(error: Exception, code: int) -> None:
    print(f"remanence: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="remanence", description="Where should new knowledge live? Compare on the same data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe; resumes", description=_RUN_HELP, formatter_class=shape)
    run.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a YAML file")
    run.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/NAME-HASH)")
    run.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: one per core)")
    run.add_argument("--dry-run", action="store_true", help="check the recipe, say what would run, and stop")
    run.set_defaults(command=_run)

    example = "example:\n  remanence compare runs/digits-*"
    compare = commands.add_parser("compare", help="five-verb table", description=example, formatter_class=shape)
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    compare.set_defaults(command=_compare)

    example = "example:\n  remanence report runs/digits-0123456789ab"
    report = commands.add_parser("report", help="one self-contained HTML page", description=example, formatter_class=shape)
    report.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    report.set_defaults(command=_report)

    meta_train.add(commands, shape)
    trace.add(commands, shape)
    erase.add(commands, shape)
    context.add(commands, shape)

    example = "example:\n  remanence list"
    listing = commands.add_parser("list", help="what there is", description=example, formatter_class=shape)
    listing.set_defaults(command=_list)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from remanence import grid
    from remanence.progress import terminal
    from remanence.recipe import read_recipe
    from remanence.recipes import recipe_path

    if arguments.jobs < 1:
        raise RecipeError(f"--jobs {arguments.jobs}: give at least 1 process.")
    recipe = read_recipe(recipe_path(arguments.recipe), overrides(arguments.overrides))
    folder = arguments.out or Path("runs") / f"{recipe.name}-{recipe.run}"
    console = terminal()
    cells = grid.cells_of(recipe)
    stated = f", stated to take {recipe.tree['minutes']} minutes on two cores" if recipe.is_stated and "minutes" in recipe.tree else ""
    console.print(f"{recipe.name}: {len(cells)} cells ({len(recipe.grid())} pairs x {len(recipe.seeds)} seeds){stated}")
    notes = grid.check(recipe)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    if arguments.dry_run:
        console.print(f"the recipe is sound; it would run into {folder}")
        return 0
    start = time.monotonic()
    _work(recipe, folder, arguments.jobs, console, notes)
    console.print(f"done in {time.monotonic() - start:.0f} s\n")
    return _conclude(recipe, folder, console)


def _work(recipe: "Recipe", folder: Path, jobs: int, console: "Console", notes: list[str]) -> None:
    """Artifacts, then cells; a bar on a terminal, a line per finished piece elsewhere."""
    from remanence import grid
    from remanence.progress import WorkProgress

    command = shlex.join(["remanence", *sys.argv[1:]])
    with WorkProgress(console) as progress:
        folders = grid.prepare(recipe, folder, command, progress.artifact, notes)
        cells = grid.cells_of(recipe)
        progress.begin_cells(len(cells))
        grid.run_cells(recipe, folders, folder, jobs, progress.cell)


def _conclude(recipe: "Recipe", folder: Path, console: "Console") -> int:
    from remanence.ledger import Ledger
    from remanence.probes import five_verbs
    from remanence.report import compare_table, write_report
    from remanence.report.expectations import check_expectations

    frame = Ledger.open(folder)
    console.print(compare_table([frame]))
    outcomes = check_expectations(recipe.tree.get("expect", []), five_verbs(frame)) if recipe.is_stated else []
    for outcome in outcomes:
        console.print(str(outcome), highlight=False)
    console.print(f"report: {write_report(folder)}", soft_wrap=True, highlight=False)
    return 0 if all(outcome.holds for outcome in outcomes) else 1


def _compare(arguments: argparse.Namespace) -> int:
    from remanence.ledger import Ledger
    from remanence.progress import terminal
    from remanence.report import compare_table

    terminal().print(compare_table([Ledger.open(run) for run in arguments.runs]))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from remanence.progress import terminal
    from remanence.report import write_report

    terminal().print(str(write_report(arguments.run, arguments.out)), soft_wrap=True, highlight=False)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from remanence.listing import listing
    from remanence.progress import terminal

    terminal().print(listing())
    return 0
