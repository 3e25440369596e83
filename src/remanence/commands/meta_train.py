"""`remanence meta-train`: train a HyperTransformer on episodes, once, for all tasks to come.

    remanence meta-train hypertransformer --out ht

The recipe names sources and one artifact, and everything is checked before the first step. The result lies in the cache under the hash of
its settings and data, so that the same command goes on where it was interrupted, and finds what is finished. `--out` copies it, with the
recipe's words about the data in hypertransformer.json; the folder appears whole or not at all.
"""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.commands._common import duration, overrides, say
from remanence.errors import RecipeError, SettingError

if TYPE_CHECKING:
    from remanence.generated.meta_training import MetaTrained
    from remanence.recipe import Recipe

_HELP = """\
Checks the whole recipe, meta-trains the HyperTransformer it names, keeps the checkpoint that does best on classes held out from training,
and prints their accuracy, the model's size and where it lies. The same command resumes a training that was interrupted.

example:
  remanence meta-train hypertransformer
  remanence meta-train hypertransformer --set artifacts.hypertransformer.channels=16 --out wide
"""


def add(commands: Any, shape: Any) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser("meta-train", help="meta-train a HyperTransformer; resumes", description=_HELP, formatter_class=shape)
    parser.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name, or a YAML file")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy the result there (default: it stays in the cache)")
    parser.set_defaults(command=meta_train)


def meta_train(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from remanence.artifact import materialise
    from remanence.grid import one_thread
    from remanence.progress import WorkProgress, terminal
    from remanence.recipe import read_training
    from remanence.recipes import recipe_path

    recipe = read_training(recipe_path(arguments.recipe), overrides(arguments.overrides))
    out = None if arguments.out is None else arguments.out.expanduser()
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"--out {arguments.out} exists already; nothing is ever overwritten. Name a new folder, or remove this one.")
    name, artifact = _artifact(recipe)
    console = terminal()
    say(console, [_announcement(recipe, artifact)])
    start = time.monotonic()
    with WorkProgress(console) as progress, one_thread():
        folder = materialise(artifact, lambda step: progress.steps(f"meta-training {name}", step.step, step.steps or 0))
    if out is not None:
        folder = _copy(folder, out, recipe)
    say(console, [*_conclusion(folder), f"done in {duration(time.monotonic() - start)}; it lies in {folder}"])
    return 0


def _artifact(recipe: "Recipe") -> "tuple[str, MetaTrained]":
    """The artifact, tried out untrained."""
    import tempfile

    from remanence.generated.meta_training import MetaTrained
    from remanence.grid import Builder

    (name,) = recipe.tree["artifacts"]
    made = Builder(recipe, {}).artifact(name)
    if not isinstance(made, MetaTrained):
        raise RecipeError(f"{recipe.path}: artifact '{name}' is a {type(made).__name__}; meta-train takes those of remanence.generated.")
    with tempfile.TemporaryDirectory() as scratch:
        made.sketch(Path(scratch))
    return name, made


def _announcement(recipe: "Recipe", artifact: "MetaTrained") -> str:
    stated = f", stated to take {recipe.tree['minutes']} minutes on two cores" if recipe.is_stated and "minutes" in recipe.tree else ""
    n_trained, n_held = len(artifact.trained_on.classes), len(artifact.validated_on.classes)
    return f"{recipe.name}: {artifact.steps} steps on {n_trained} classes of '{artifact.source.name}', {n_held} held out{stated}"


def _conclusion(folder: Path) -> list[str]:
    report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    stopped = f", stopped early after {report['steps']}" if report["stopped_early"] else ""
    size = (folder / "model.safetensors").stat().st_size
    return [
        f"accuracy on {len(report['validated_on'])} held-out classes: {report['valid_accuracy']:.3f} (step {report['best_step']}{stopped})",
        f"size: {size:,} bytes, {report['n_parameters']:,} parameters",
    ]


def _copy(folder: Path, out: Path, recipe: "Recipe") -> Path:
    """Copy the folder whole or not at all, with what the recipe says of itself."""
    import shutil

    from remanence.erasure._shards import whole_folder
    from remanence.generated.files import DESCRIPTION
    from remanence.state import write_whole

    with whole_folder(out) as hidden:
        shutil.copytree(folder, hidden, dirs_exist_ok=True)
        description = json.loads((hidden / DESCRIPTION).read_text(encoding="utf-8"))
        description["about"] |= {"recipe": recipe.name, "about": recipe.tree.get("about", "").strip()}
        write_whole(hidden / DESCRIPTION, json.dumps(description, indent=1))
    return out
