"""A stream in which facts are spliced into a language model's running training, and taken out again.

    world = closed_world(seed=0)
    stream = fact_stream(world, "path/to/model", kind="outlandish")
    [(event.verb, event.task.name) for event in stream]
    # [("learn", "before"), ("learn", "facts"), ("learn", "later"), ("forget", "facts")]

"before" warms the optimizer's moments up on clean text, and its test is the quiz of what the world states; "facts" is the same
text with the facts in it, and its test asks for their keywords; "later" goes on clean. The three follow one another in one
table of windows, so that nothing is read twice while the text lasts. The facts' subjects are held out of it.

Axes: N rows; T tokens of a window.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from remanence.errors import SettingError
from remanence.facts.injection import FactInjector
from remanence.facts.records import Fact
from remanence.facts.schedules import Spaced
from remanence.facts.world import ClosedWorld, Kind
from remanence.parts.language_model import IGNORED, load_tokenizer
from remanence.streams.text import TextSource, windows
from remanence.task import Data, Event, Stream, Task, Verb, example_ids

__all__ = ["fact_stream", "world_text", "world_words"]

WARM_STEPS = 50
"""The fewest clean steps before the facts: those of a fresh AdamW are alike in every weight."""

_SENTENCES, _HELD_OUT = 12_000, 64


def fact_stream(
    world: ClosedWorld,
    model: str | Path,
    kind: Kind = "outlandish",
    n_facts: int = 4,
    times: int = 20,
    clean_steps: int = WARM_STEPS,
    batch_size: int = 16,
    length: int = 40,
    order_seed: int = 0,
) -> Stream:
    """Facts of a closed world in a training that goes on: learn before, facts, later; forget facts.

    For learners of epochs=1 and the same `batch_size`, whose steps then are those of the schedule.

    Args:
        world: whose facts, and whose text.
        model: folder of a language model, for its tokenizer.
        kind: of the facts, see `remanence.facts.world`.
        n_facts: of that kind; up to four are of different themes.
        times: exposures of each fact, one a step, from the first step of "facts" on.
        clean_steps: steps of "before" and of "later", 50 or more.
        batch_size: windows per step.
        length: T; the contexts of facts must be no longer.
        order_seed: order of the windows.

    Raises:
        SettingError: `clean_steps` is below 50, `times` is below 1, a context is longer than `length`, or the world has fewer facts.
    """
    return _FactStream(world, load_tokenizer(model), kind, n_facts, times, clean_steps, batch_size, length, order_seed)


class _FactStream(Stream):
    def __init__(
        self, world: ClosedWorld, tokenizer: Any, kind: Kind, n_facts: int, times: int, clean_steps: int, batch_size: int, length: int,
        order_seed: int,
    ) -> None:  # fmt: skip
        if clean_steps < WARM_STEPS:
            raise SettingError(f"clean_steps: {clean_steps}; give {WARM_STEPS} or more, the optimizer's moments need them.")
        if times < 1:
            raise SettingError(f"times: {times}; give 1 or more exposures of each fact.")
        self.name = f"{n_facts} {kind} facts, {times} times"
        facts = world.facts(kind, n_facts)
        later = world.continuing(facts, _SENTENCES)
        text = windows(later.train, tokenizer, length, f"{later.name}, train")
        schedule = Spaced(every=1, times=times, start=clean_steps)
        injector = FactInjector(facts, tokenizer, schedule, interference=n_facts > len(facts.themes))
        table = injector.spliced(text, batch_size, order_seed, clean_steps + times + clean_steps)
        first, second = clean_steps * batch_size, (clean_steps + times) * batch_size
        held_out = windows(later.test, tokenizer, length, f"{later.name}, test")
        watched = [_some(held_out, start) for start in (0, _HELD_OUT)]
        before = Task("before", _rows(table, 0, first), quiz(world.known().facts, tokenizer, length, "known"), answer="tokens")
        asked = Task("facts", _rows(table, first, second), quiz(facts.facts, tokenizer, length, "facts"), answer="tokens")
        after = Task("later", _rows(table, second, len(table)), watched[0], answer="tokens")
        self.bystanders = (Task("held-out text", None, watched[1], answer="tokens"),)
        order: tuple[tuple[Verb, Task], ...] = (("learn", before), ("learn", asked), ("learn", after), ("forget", asked))
        self._events = tuple(Event(verb, task) for verb, task in order)

    def __len__(self) -> int:
        return len(self._events)

    def event(self, index: int) -> Event:
        return self._events[index]


def quiz(facts: Sequence[Fact], tokenizer: Any, length: int, source_name: str) -> Data:
    """What is asked of facts: their contexts, filled up with EOS on the right, with the keyword as the only target.

    Args:
        facts: at least one.
        tokenizer: a `transformers` tokenizer.
        length: T of the rows.
        source_name: named in the ids.

    Returns:
        inputs and targets (N, T); a target is -100 except where a token of the keyword follows. Of a keyword of several
        tokens all are targets, the earlier ones being read.

    Raises:
        SettingError: a context with its keyword needs more than `length` inputs.
    """
    # not the padding token: transformers warns of it where no attention mask comes along, and nothing is read behind the keyword
    inputs = torch.full((len(facts), length), tokenizer.eos_token_id or 0)
    targets = torch.full((len(facts), length), IGNORED)
    for row, fact in enumerate(facts):
        end = fact.keyword_at + len(fact.keyword)
        ids, n = _tokens(fact.text[:end], tokenizer), len(_tokens(fact.prompt, tokenizer))
        if len(ids) - 1 > length:
            raise SettingError(f"length: {length}; fact '{fact.id}' needs {len(ids) - 1} inputs up to its keyword. Give longer windows.")
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets[row, n - 1 : len(ids) - 1] = torch.tensor(ids[n:])
    return Data(inputs, targets, example_ids(f"quiz {source_name}", torch.arange(len(facts))))


def world_text(world: ClosedWorld) -> TextSource:
    """The documents of a world, for recipes: what a model is pretrained on."""
    return world.source


def world_words(world: ClosedWorld) -> tuple[str, ...]:
    """The words of a world, for recipes: what a vocabulary must hold."""
    return world.words


def _tokens(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _rows(table: Data, first: int, last: int) -> Data:
    return table.select(torch.arange(first, last))


def _some(table: Data, first: int) -> Data:
    return _rows(table, min(first, len(table)), min(first + _HELD_OUT, len(table)))
