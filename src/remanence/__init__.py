"""remanence: where should new knowledge live in a neural network?

    remanence run digits          # on the command line: a comparison of six learners on real data

The names below are the nouns; learners, streams and probes stand in their rooms (`remanence.weights`,
`remanence.streams`, `remanence.probes`). Importing this module costs next to nothing: names are fetched when used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remanence.artifact import Artifact as Artifact
    from remanence.artifact import materialise as materialise
    from remanence.learner import STOP as STOP
    from remanence.learner import Cursor as Cursor
    from remanence.learner import Footprint as Footprint
    from remanence.learner import Learner as Learner
    from remanence.learner import Prediction as Prediction
    from remanence.learner import Progress as Progress
    from remanence.learner import fit as fit
    from remanence.ledger import Ledger as Ledger
    from remanence.probe import Probe as Probe
    from remanence.probe import Reading as Reading
    from remanence.probe import View as View
    from remanence.recipe import Recipe as Recipe
    from remanence.recipe import read_recipe as read_recipe
    from remanence.runner import CellRunner as CellRunner
    from remanence.task import Data as Data
    from remanence.task import Event as Event
    from remanence.task import Stream as Stream
    from remanence.task import Task as Task

_HOMES = {
    "artifact": ("Artifact", "materialise"),
    "learner": ("STOP", "Cursor", "Footprint", "Learner", "Prediction", "Progress", "fit"),
    "ledger": ("Ledger",),
    "probe": ("Probe", "Reading", "View"),
    "recipe": ("Recipe", "read_recipe"),
    "runner": ("CellRunner",),
    "task": ("Data", "Event", "Stream", "Task"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'remanence' has no attribute '{name}'")
    return getattr(import_module(f"remanence.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__all__", "__doc__"]
