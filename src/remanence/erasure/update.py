"""Sparse updates of a model in memory: a window of training steps, then a mask on what it changed.

    with SparseUpdate(model, select="ignore_top", fraction=0.08) as window:
        train(model)
        window.apply()                          # masks everything since the `with` line; a new window begins

    window = SparseUpdate.wrap(optimizer, model, every=8, fraction=0.04)
    ... optimizer.step() ...                    # masks by itself after every eighth step
    window.remove()

Costs one more copy of the weights in scope, on their device. Weights outside the scope are never touched: unlike `sparse_delta`,
a window holds no copy to return them to. The optimizer's moments are left alone unless `reset_moments` is set.

Source: Sun et al. 2025 (arXiv 2504.09522); see `remanence.erasure.sparse`.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remanence.erasure._selection import Granularity, Rule, Selection, select_kept
from remanence.erasure.scope import Scope, default_scope, scoped_names, tied_names
from remanence.errors import SettingError, StateMismatchError
from remanence.state import State, copy_state

Parameters = dict[str, nn.Parameter]


class SparseUpdate:
    """A window of training steps whose change is masked in place.

    Entering the `with` block (or `open`) copies the weights in scope. `apply` masks what happened since and begins the next
    window. Leaving the block counts no more steps and masks nothing: steps of an unfinished window stay as they are until `apply`
    is called, inside or after the block. The mask equals that of `sparse_delta` on the same weights; a tied parameter is
    masked once, under its first name.

    Args:
        model: whose parameters are masked; on any device, of any floating dtype.
        select, fraction, granularity, signed: see `sparse_delta`.
        every: mask after each so many steps of `optimizer`; None: only when `apply` is called.
        optimizer: whose steps are counted, and whose moments may be reset.
        include_embeddings: mask embeddings and the output layer as well; without effect when `scope` is given.
        reset_moments: zero the optimizer's moments where a weight gets its old value back. Default off: the next steps may then
            push the same entries again.
        scope: (name, parameter) -> whether it is masked; default: `default_scope(model, include_embeddings)`.

    Raises:
        SettingError: a setting is out of range or lacks its optimizer, nothing is in scope, or the weights are quantised or those
            of an adapter.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False).requires_grad_(False)
        >>> _ = layer.weight.zero_()
        >>> with SparseUpdate(layer, fraction=0.25) as window:
        ...     _ = layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        ...     window.apply()
        >>> layer.weight
        Parameter containing:
        tensor([[1., 2.],
                [3., 0.]])
    """

    def __init__(
        self,
        model: nn.Module,
        select: Selection = "ignore_top",
        fraction: float = 0.08,
        every: int | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        include_embeddings: bool = False,
        reset_moments: bool = False,
        granularity: Granularity = "tensor",
        signed: bool = False,
        scope: Scope | None = None,
    ) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._prepare(parameters, Rule(select, fraction, signed, granularity), scope or default_scope(model, include_embeddings))
        self._attach(optimizer, every, reset_moments)

    def _prepare(self, parameters: Parameters, rule: Rule, scope: Scope) -> None:
        self.rule = rule
        names = scoped_names(parameters, scope, tied_names(parameters))
        self._parameters = {name: parameters[name] for name in names}
        self._start: dict[str, Tensor] | None = None
        self._hook: RemovableHandle | None = None
        self.n_steps = 0

    def _attach(self, optimizer: torch.optim.Optimizer | None, every: int | None, reset_moments: bool) -> None:
        if every is not None and every < 1:
            raise SettingError(f"every={every} must be at least 1 step, or None to mask only when apply() is called.")
        if optimizer is None and (every is not None or reset_moments):
            asked = f"every={every} counts its steps" if every is not None else "reset_moments=True zeroes its moments"
            raise SettingError(f"no optimizer was handed in, but {asked}; pass optimizer=...")
        self.optimizer, self.every, self.reset_moments = optimizer, every, reset_moments

    @classmethod
    def wrap(
        cls,
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        every: int,
        select: Selection = "ignore_top",
        fraction: float = 0.08,
        include_embeddings: bool = False,
        reset_moments: bool = False,
        granularity: Granularity = "tensor",
        signed: bool = False,
        scope: Scope | None = None,
    ) -> Self:
        """Mask after every so many steps of an optimizer, from now until `remove`.

        Go on calling `optimizer.step()`; the returned window has `step` and `zero_grad` too, and may stand in for the optimizer in
        a loop. Learning rate schedulers and checkpoints take the optimizer itself.

        Args:
            optimizer: counts the steps; left as it is but for a hook.
            model: tells embeddings from other weights; not needed when the optimizer was built from `model.named_parameters()`.
            every: steps per window, at least 1.

        Raises:
            SettingError: as in the constructor, or the parameters have no names.
        """
        self = cls.__new__(cls)
        named = _named(optimizer) if model is None else dict(model.named_parameters(remove_duplicate=False))
        self._prepare(named, Rule(select, fraction, signed, granularity), scope or default_scope(model, include_embeddings))
        self._attach(optimizer, every, reset_moments)
        return self.open()

    # --- the window --------------------------------------------------------------------------------------------

    def open(self) -> Self:
        """Begin the first window here: copy the weights in scope and, with `every`, count the optimizer's steps from now on.

        Raises:
            SettingError: it is open already.
        """
        if self._start is not None:
            raise SettingError("this window is open already; call apply() to mask and begin the next one, or remove() to give it up.")
        self._start = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self.n_steps = 0
        if self.optimizer is not None and self.every is not None:
            self._hook = self.optimizer.register_step_post_hook(lambda *_: self._after_step())
        return self

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self._unhook()

    def remove(self) -> None:
        """Stop counting steps and drop the copy; the weights stay as they are."""
        self._unhook()
        self._start = None

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _after_step(self) -> None:
        self.n_steps += 1
        assert self.every is not None
        if self.n_steps % self.every == 0:
            self.apply()

    def _opened(self) -> dict[str, Tensor]:
        if self._start is None:
            raise SettingError("no window is open, its first weights are unknown; enter it with `with`, or call open(), before training.")
        return self._start

    @torch.no_grad()
    def apply(self) -> None:
        """Give masked entries their value from the start of the window back, in place, and begin the next window.

        Raises:
            SettingError: no window is open.
            DataError: a change is NaN or infinite; with granularity "tensor", those before it in the alphabet are masked by then.
        """
        start = self._opened()
        for kept in select_kept(self.rule, start, lambda name: (start[name], self._parameters[name].detach())):
            parameter = self._parameters[kept.name]
            parameter.copy_(kept.merge())
            start[kept.name].copy_(parameter)
            if self.reset_moments:
                self._reset(parameter, kept.mask)

    def _reset(self, parameter: nn.Parameter, mask: Tensor) -> None:
        assert self.optimizer is not None
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.masked_fill_(~mask.to(value.device), 0)

    # --- in place of the optimizer -----------------------------------------------------------------------------

    def step(self, closure: Any = None) -> Any:
        """The optimizer's step."""
        return self._require_optimizer().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's zero_grad."""
        self._require_optimizer().zero_grad(set_to_none)

    def _require_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise SettingError("this window has no optimizer to step; pass optimizer=..., or use SparseUpdate.wrap(optimizer, ...).")
        return self.optimizer

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """The window's start, copied, the number of steps so far and the settings; neither the model nor the optimizer.

        Raises:
            SettingError: no window is open.
        """
        return {"settings": self._settings(), "n_steps": self.n_steps, "start": copy_state(self._opened())}

    def load_state_dict(self, state: State) -> None:
        """Continue the window of an interrupted run; open this one, and load model and optimizer, beforehand or after.

        With all three loaded, the run goes on bit for bit as if it had not been interrupted.

        Raises:
            SettingError: no window is open.
            StateMismatchError: the saved window has other settings or other weights.
        """
        start, settings = self._opened(), self._settings()
        other = {key: (state["settings"].get(key), value) for key, value in settings.items() if state["settings"].get(key) != value}
        if other:
            told = ", ".join(f"{key}: saved {saved!r}, here {here!r}" for key, (saved, here) in other.items())
            raise StateMismatchError(f"the saved window has other settings ({told}); resume with those it was saved with.")
        require_same_weights(start, state["start"])
        for name, value in start.items():
            value.copy_(state["start"][name])
        self.n_steps = state["n_steps"]

    def _settings(self) -> dict[str, Any]:
        select = self.rule.select if isinstance(self.rule.select, str) else list(self.rule.select)
        return {
            "select": select,
            "fraction": self.rule.fraction,
            "signed": self.rule.signed,
            "granularity": self.rule.granularity,
            "every": self.every,
            "reset_moments": self.reset_moments,
        }


def require_same_weights(here: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Refuse the saved start of another model's window.

    Raises:
        StateMismatchError: names, shapes or dtypes differ.
    """
    kinds = [{name: (tuple(value.shape), value.dtype) for name, value in state.items()} for state in (here, saved)]
    wrong = sorted(name for name in kinds[0].keys() | kinds[1].keys() if kinds[0].get(name) != kinds[1].get(name))
    if wrong:
        first = wrong[0]
        raise StateMismatchError(
            f"the saved window covers other weights: {len(wrong)} names, shapes or dtypes differ (first: '{first}', saved "
            f"{kinds[1].get(first, 'absent')}, here {kinds[0].get(first, 'absent')}). Resume with the same model and scope."
        )


def _named(optimizer: torch.optim.Optimizer) -> Parameters:
    """The optimizer's parameters under the names that it was told.

    Raises:
        SettingError: it was told none.
    """
    named: Parameters = {}
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise SettingError(
                "the optimizer does not know its parameters' names, so that embeddings cannot be told from other weights; "
                "pass the model, or build the optimizer from model.named_parameters()."
            )
        named |= dict(zip(group["param_names"], group["params"], strict=True))
    return named
