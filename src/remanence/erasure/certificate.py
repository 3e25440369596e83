"""What an erasure was shown to have done: one record, one JSON file, one table.

An erasure by approximate means proves nothing about what is left in the weights. A certificate therefore states a level, each
with a meaning that is written beside it, lists what was measured before and after, and names what was not.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from remanence.erasure.changes import WeightChange
from remanence.state import write_whole

if TYPE_CHECKING:
    from rich.table import Table

Statement = Literal["nothing to erase", "not erased", "suppressed", "relearning"]

MEANINGS: Mapping[Statement, str] = {
    "nothing to erase": "the facts were not known before: their keywords were no likelier than the target allows",
    "not erased": "the facts' keywords are still likelier than the target allows",
    "suppressed": "the model no longer says the keywords; what is left in the weights was not shown to be gone",
    "relearning": "the model no longer says the keywords, and learning them again takes about as long as learning them anew",
}


@dataclass(frozen=True)
class Value:
    """A figure and where it lies with 95 % confidence over facts; no bounds where fewer than two facts stand behind it."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 1


@dataclass(frozen=True)
class Measure:
    """One measure before and after the erasure.

    Args:
        name: of the measure.
        unit: of all its figures.
        before: with the facts in; None where it was not measured.
        after: with the facts out.
        target: of a model that never saw the facts, or what stands in for it; None where there is none.
        note: how to read it; "not run: ..." where it was not measured.
    """

    name: str
    unit: str
    before: Value | None = None
    after: Value | None = None
    target: float | None = None
    note: str = ""

    @property
    def was_run(self) -> bool:
        """Whether there is anything but a reason."""
        return not self.note.startswith("not run")


@dataclass(frozen=True)
class Certificate:
    """What was erased, how, and what was measured; made by `remanence.erasure.certify`.

    Args:
        statement: the level that was shown; `MEANINGS` says what it means.
        model_before: sha256 of the state before the erasure.
        model_after: sha256 of the state after it.
        tokenizer: sha256.
        data: name -> sha256 and n, the number of rows.
        method: name and all parameters.
        seed: key of its random choices.
        steps: gradient steps it took.
        seconds: it took.
        weights: how many changed, by module.
        measures: in the order of the table.
        facts: one record a fact: id and its log-probabilities in nats.
        warnings: what a reader must know.
        environment: machine and versions.
    """

    statement: Statement
    model_before: str
    model_after: str
    tokenizer: str
    data: Mapping[str, Mapping[str, Any]]
    method: Mapping[str, Any]
    seed: int
    steps: int
    seconds: float
    weights: WeightChange
    measures: tuple[Measure, ...]
    facts: tuple[Mapping[str, Any], ...]
    warnings: tuple[str, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)

    def measure(self, name: str) -> Measure:
        """The measure of this name.

        Raises:
            KeyError: there is none.
        """
        found = {each.name: each for each in self.measures}
        if name not in found:
            raise KeyError(f"the certificate has no measure '{name}'; it has {', '.join(found)}")
        return found[name]

    def to_json(self) -> str:
        """Readable JSON; figures that do not exist are null."""
        content = {"format": "remanence erasure certificate 1", "statement": self.statement, "statement_means": MEANINGS[self.statement]}
        weights = self.weights
        by_module = {name: {**change._asdict(), "share": change.n_changed / max(1, change.n)} for name, change in weights.by_module.items()}
        content |= _finite(asdict(self)) | {
            "statement": self.statement,
            "weights": {**_finite(weights._asdict()), "share": weights.share, "by_module": _finite(by_module)},
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the JSON file, whole or not at all; its folder is made when absent."""
        write_whole(Path(path).expanduser(), self.to_json())

    def table(self) -> "Table":
        """A rich table: a row a measure, before, after and target with 95 % intervals; how to read them, and warnings, below it."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # Text: a name in square brackets is never read as markup
        table = Table(
            box=box.SIMPLE_HEAD,
            title=Text(f"{self.statement}: {MEANINGS[self.statement]}"),
            caption=Text("\n".join(self._remarks())),
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("measure", no_wrap=True)
        for name in ("before", "after", "target"):
            table.add_column(name, justify="right")
        table.add_column("unit")
        for each in self.measures:
            target = "" if each.target is None else f"{each.target:.3g}"
            before = _shown(each.before) if each.was_run else "not run"
            table.add_row(*map(Text, (each.name, before, _shown(each.after), target, each.unit)))
        return table

    def _remarks(self) -> list[str]:
        moved = f"{self.weights.n_changed} of {self.weights.n} weights changed ({self.weights.share:.1%})"
        names: dict[str, list[str]] = {}
        for each in self.measures:
            names.setdefault(each.note, []).append(each.name)
        return [
            f"{self.method.get('name', 'unnamed method')}, {self.steps} steps, {self.seconds:.1f} s; {moved}",
            f"model {self.model_before[:12]} -> {self.model_after[:12]}",
            *(f"{', '.join(which)}: {note}" for note, which in names.items() if note),
            *(f"! {warning}" for warning in self.warnings),
        ]


def _shown(value: Value | None) -> str:
    if value is None or math.isnan(value.value):
        return ""
    bounds = "" if math.isnan(value.low) else f" [{value.low:.3g}, {value.high:.3g}]"
    return f"{value.value:.3g}{bounds}"


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(item) for item in value]
    return value
