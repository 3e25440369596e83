"""Reading as learning: the models of this room as learners of documents.

    learner = MelodiReader(folder)                       # of a MelodiLM, or of any other model of this room
    fit(learner, document)                               # a Task of windows in order, see remanence.streams.documents
    learner.score(inputs, targets, task=document.name)   # through what was read
    fit(learner, document.select(rows), "forget")        # exactly as if these windows had never been read

Axes: B batch; N rows of a task; T tokens of a row; V vocabulary; R rows of a document.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.context._read_document import ReadDocument
from remanence.context.kinds import load_context_model
from remanence.errors import ErasureNotSupported, SettingError
from remanence.learner import Cursor, Footprint, Learner, Prediction, Steps, require_learnable
from remanence.parts.gradient import run_verb
from remanence.parts.language_model import require_token_windows, row_scores
from remanence.state import State, state_bytes
from remanence.task import Data, Task

ForgetMode = Literal["replay", "slots"]
_ROWS = 16
"""Rows that are answered at once; each takes a copy of the document's memory."""


class MelodiReader(Learner):
    """Reads documents, one state for each; the weights never change.

    A task is a document, its train set the document's windows, read one a step. `predict` answers every row as if it followed what was read
    of the task that is named, or of the one that has a part of that name; a name that was never read begins an empty state. Nothing that is
    asked is remembered.

    `forget` takes a segment out: the rows with the ids of `task.select(rows)`, in whichever documents they were read. A document of which
    nothing is left is dropped whole, exactly, in either mode.

    - "replay" returns to the snapshot before the segment's first row and reads what follows it again, a row a step. Exact: the state is,
      bit for bit, that of a learner which never read the segment. It costs the text, four bytes a token, and the snapshots.
    - "slots" empties the places of the queue that the segment's windows wrote, at once. Partial: later windows were summarised while the
      segment could be read, and the short-term memory stays. A window that holds any token of the segment goes whole, and so does the text
      of a window that is not complete. Only MELODI has such places.

    Args:
        model: folder that `save_pretrained` of a model of this room wrote, or such a model; copied.
        forget_mode: what must be kept for: with "slots" neither text nor snapshots are. "replay" can do both.
        snapshot_every: rows from one snapshot to the next; more of them make forgetting shorter and the footprint larger.
        seed: key of the order of rows of a table that is not ordered.
        device: where it runs; text and snapshots are kept in main memory.

    Raises:
        SettingError: the mode is unknown or needs MELODI, or `snapshot_every` is below 1.
        DataError: the folder holds no model of this room.

    Source: forgetting by going back and reading again is sharded retraining's idea in time (Bourtoule et al. 2021, arXiv 1912.03817). ours:
        both modes, on a memory whose places know the window that they came from.
    """

    store = "context"
    answers = ("tokens",)
    needs_task_id = True

    def __init__(
        self, model: str | Path | nn.Module, forget_mode: ForgetMode = "replay", snapshot_every: int = 8, seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        if snapshot_every < 1:
            raise SettingError(f"{type(self).__name__}: snapshot_every={snapshot_every} must be 1 or more.")
        self.seed, self.snapshot_every, self.device = seed, snapshot_every, torch.device(device)
        self.model: Any = (deepcopy(model) if isinstance(model, nn.Module) else load_context_model(model)).eval().to(self.device)
        self.forget_mode = self._known_mode(forget_mode)
        self.cursor = Cursor()
        self._documents: dict[str, ReadDocument] = {}

    def _known_mode(self, mode: str) -> str:
        if mode not in ("replay", "slots"):
            raise SettingError(f"{type(self).__name__}: forget_mode '{mode}' is unknown; choose one of replay, slots.")
        if mode == "slots" and not hasattr(self.model.state_class, "forget"):
            raise SettingError(
                f"{type(self).__name__}: forget_mode 'slots' empties places of MELODI's queue, a {type(self.model).__name__} has none; "
                f"choose 'replay'."
            )
        return mode

    # --- learn -------------------------------------------------------------------------------------------------

    def learn(self, task: Task) -> Steps:
        data = require_learnable(self, task)
        require_token_windows(data, task.name, self.model.config.vocab_size)
        return run_verb(
            self.cursor,
            ("learn", task.name, data.steps(1, 1)),
            self._read_all,
            lambda step: self._learn_row(task, data, step),
            lambda: None,
        )

    def _learn_row(self, task: Task, data: Data, step: int) -> tuple[Tensor | None, int]:
        document = self._documents.get(task.name)
        if document is None:
            document = self._documents[task.name] = ReadDocument(self._empty(), [task.name])
        document.names = list(dict.fromkeys([*document.names, *(leaf.name for leaf in task.leaves)]))
        row = int(data.rows(step, 1, self.seed, "learn", task.name))
        document.append(data.inputs[row], data.ids[row], self.forget_mode == "replay")
        logits = self._read(document, data.inputs[row])
        targets = data.targets[row].to(self.device)
        counted = targets >= 0
        return (F.cross_entropy(logits[counted].float(), targets[counted]) if bool(counted.any()) else None), 1

    def _empty(self) -> Any:
        return self.model.init_state(1, device=self.device)

    @torch.no_grad()
    def _read(self, document: ReadDocument, tokens: Tensor) -> Tensor:
        """Read the document's next row (T,): logits (T, V)."""
        if self.forget_mode == "replay" and document.n_read and document.n_read % self.snapshot_every == 0:
            document.keep_snapshot()
        logits, state = self.model(tokens[None].to(self.device), document.state)
        document.advance(state)
        return logits[0]  # type: ignore[no-any-return]

    def _read_all(self) -> None:
        """Read every row that still waits, because a forgetting was left open or stopped."""
        while self._waiting():
            self._read_waiting()

    def _waiting(self) -> int:
        return sum(len(document.ids) - document.n_read for document in self._documents.values())

    def _read_waiting(self) -> tuple[None, int]:
        document = next(document for document in self._documents.values() if document.n_read < len(document.ids))
        self._read(document, document.waiting())
        return None, 1

    # --- forget ------------------------------------------------------------------------------------------------

    def forget(self, task: Task, retain: Data | None = None, mode: ForgetMode | None = None) -> Steps:
        """Take a document, or a segment of one, out again.

        Args:
            task: the rows to forget are those of its train set, found by their ids.
            retain: not read.
            mode: "replay" or "slots", see the class; by default `forget_mode`.

        Raises:
            ErasureNotSupported: no row of it was read or is still kept, or the mode needs what was not kept.
            SettingError: as in the class.
        """
        data = require_learnable(self, task)
        chosen = self.forget_mode if mode is None else self._known_mode(mode)
        if chosen == "replay" and self.forget_mode == "slots":
            raise ErasureNotSupported(
                f"{type(self).__name__} with forget_mode='slots' keeps neither text nor snapshots, so that nothing can be read again. "
                f"Forget by slots, or build it with forget_mode='replay'."
            )
        # a forgetting that goes on has dropped its rows already
        if not self._found(data) and (self.cursor.verb, self.cursor.task) != ("forget", task.name):
            known = ", ".join(f"'{name}' ({len(document.ids)} rows)" for name, document in self._documents.items())
            raise ErasureNotSupported(
                f"{type(self).__name__} has read none of the {len(data)} rows of '{task.name}', or forgot them before. Read: "
                f"{known or 'nothing'}. Forget rows of those; they are found by their ids."
            )
        return self._replay(task, data) if chosen == "replay" else self._empty_slots(task, data)

    def _found(self, data: Data) -> dict[str, Tensor]:
        """Document -> which of its rows (R,) bool are among these."""
        masks = {name: torch.isin(document.ids, data.ids) for name, document in self._documents.items()}
        return {name: mask for name, mask in masks.items() if bool(mask.any())}

    def _replay(self, task: Task, data: Data) -> Steps:
        found = self._found(data)
        if found:
            self.cursor.close()  # another segment of this document may have been left open
        n_steps = self.cursor.step + self._waiting()
        for name, gone in found.items():
            document = self._documents[name]
            n_steps += document.n_read - document.last_snapshot(gone) - int(gone.sum())
        yield from run_verb(
            self.cursor,
            ("forget", task.name, n_steps),
            lambda: self._go_back(self._found(data)),
            lambda step: self._read_waiting(),
            self._read_all,
        )

    def _go_back(self, found: dict[str, Tensor]) -> None:
        for name, gone in found.items():
            self._documents[name].go_back(gone, self._empty())
        self._drop_empty()

    def _empty_slots(self, task: Task, data: Data) -> Steps:
        return run_verb(self.cursor, ("forget", task.name, 0), lambda: self._drop_slots(data), lambda step: (None, 0), lambda: None)

    def _drop_slots(self, data: Data) -> None:
        self._read_all()
        for name, gone in self._found(data).items():
            if bool(gone.all()):
                del self._documents[name]
            else:
                self._documents[name].empty_slots(gone)

    def _drop_empty(self) -> None:
        self._documents = {name: document for name, document in self._documents.items() if len(document.ids)}

    # --- reading -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, inputs: Tensor, task: str | None = None, reader: str = "") -> Prediction:
        """Answer ids (B, T) with logits (B, T, V) for the tokens that follow; columns are the ids 0 .. V - 1.

        The result is dense: give few rows at a time, or ask for `score`.

        Args:
            inputs: rows, each of which goes on where reading the document ended.
            task: name of a document or of a part of one; must be told.

        Raises:
            SettingError: no name is told.
        """
        parts = list(self._logits(inputs, task)) or [self.model(inputs.to(self.device))[0]]
        return Prediction(torch.cat(parts), torch.arange(self.model.config.vocab_size, device=self.device))

    @torch.no_grad()
    def score(self, inputs: Tensor, targets: Tensor, task: str | None = None, reader: str = "") -> Tensor:
        """(B,) log-probability in float32 of each row's targets that are 0 or above, summed; logits exist for 16 rows at a time."""
        wanted = torch.split(targets.to(self.device), _ROWS)
        sums = [row_scores(logits, part) for logits, part in zip(self._logits(inputs, task), wanted, strict=False)]
        return torch.cat(sums) if sums else torch.zeros(0, device=self.device)

    def _logits(self, inputs: Tensor, task: str | None) -> Iterator[Tensor]:
        if task is None:
            raise SettingError(
                f"{type(self).__name__} holds a state for each of {len(self._documents)} documents and must be told which is asked for: "
                f"give task=, or task_id_at_test: true on the stream."
            )
        named = self._documents.get(task) or next((each for each in self._documents.values() if task in each.names), None)
        state = self._empty() if named is None else named.state
        for part in torch.split(inputs.to(self.device), _ROWS):
            if len(part):
                yield self.model(part, state.index_select(torch.zeros(len(part), dtype=torch.int64, device=self.device)))[0]

    def footprint(self) -> Footprint:
        """`task_bytes` are a document's state, and with "replay" its text and snapshots."""
        sizes = {name: state_bytes(document.state_dict()) for name, document in self._documents.items()}
        return Footprint(state_bytes(self.state_dict()) - sum(sizes.values()), sizes)

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        documents = {name: document.state_dict() for name, document in self._documents.items()}
        return {"cursor": self.cursor.state_dict(), "documents": documents}

    def load_state_dict(self, state: State) -> None:
        self.cursor.load_state_dict(state["cursor"])
        self._documents = {name: ReadDocument.from_state_dict(saved, self.model) for name, saved in state["documents"].items()}
