"""Our models as the speed benchmark uses them: states at every length of a document, and the calls that are timed.

A call that is timed begins at a state that was kept, so that lengths of a document can take turns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from melodi_arms import Arm, make
from torch import Tensor, nn

from remanence.environment import resident_bytes

Call = Callable[[], object]


class Plan(NamedTuple):
    """What is timed.

    Args:
        lengths: tokens read before, MELODI alone; the gates compare them all but the first, when memory is just full.
        compared: those of them at which every model is timed.
        rows, segment: of a call.
        rounds, block: of calls, and how many calls of a block are counted.
        train_rounds, train_block: likewise, of training steps.
        window: tokens; also how many steps of writing make a block.
        body: settings of all models, beside their own.
    """

    lengths: tuple[int, ...] = (4_096, 8_192, 16_384, 32_768, 65_536, 131_072, 262_144)
    compared: tuple[int, ...] = (4_096, 32_768, 262_144)
    rows: int = 8
    segment: int = 512
    rounds: int = 4
    block: int = 3
    train_rounds: int = 3
    train_block: int = 2
    window: int = 64
    body: dict[str, Any] = {}  # noqa: RUF012 - read only


class Reader:
    """One of our models, and its state at each length of the document.

    Args:
        arm: the model.
        plan: sizes.
        by_window: give it each window in a call of its own, as plain code would.
    """

    def __init__(self, arm: Arm, plan: Plan, by_window: bool = False) -> None:
        self.model = make(arm.model, arm.config | plan.body | {"window": plan.window}, 0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, fused=True)
        self.pieces = plan.segment // plan.window if by_window else 1
        self.tokens = document(plan.rows * plan.segment).view(plan.rows, -1)
        self.states: dict[int, Any] = {}
        self.resident: dict[int, int] = {}

    @torch.no_grad()
    def read_document(self, lengths: tuple[int, ...], step: int) -> None:
        """Read one row to the last length, and keep its state and the process's resident bytes at each."""
        state = None
        text = document(max(lengths))
        for end in range(step, max(lengths) + 1, step):
            state = self.model(text[None, end - step : end], state)[1]
            if end in lengths:
                self.states[end], self.resident[end] = state.fork(), resident_bytes() or 0

    def at(self, length: int, rows: int) -> Any:
        """The state at a length in every row."""
        return self.states[length].index_select(torch.zeros(rows, dtype=torch.int64))

    def training(self, length: int, autocast: bool) -> Call:
        state = self.at(length, len(self.tokens))

        def step() -> None:
            carried, total = state, torch.zeros(())
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for piece in self.tokens.chunk(self.pieces, 1):
                    loss, carried = self.model.loss(piece, piece, carried)
                    total = total + loss / self.pieces
            descend(total, self.model, self.optimizer)

        return step

    def reading(self, length: int, autocast: bool = False) -> Call:
        state = self.at(length, len(self.tokens))

        @torch.no_grad()
        def read() -> None:
            carried = state
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for piece in self.tokens.chunk(self.pieces, 1):
                    carried = self.model(piece, carried)[1]

        return read

    def writing(self, length: int, rows: int) -> Call:
        """One token more of every row at each call, as `generate` goes on; the choice of the token is not in it."""
        state, token = self.at(length, rows), self.tokens[:rows, :1]

        def write() -> None:
            nonlocal state
            state = self.model.step(token, state, in_place=True)[1]

        return write


def descend(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Backward, clip, and one step of AdamW."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def document(n_bytes: int) -> Tensor:
    return torch.randint(0, 256, (n_bytes,), generator=torch.Generator().manual_seed(0))
