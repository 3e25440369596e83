"""Two ways of going on with the training of a language model, both of which can take a window of it out again.

    learner = LanguageFineTuning("path/to/model")
    fit(learner, facts)                  # a Task of next-token windows, see remanence.facts.fact_stream
    fit(learner, facts, "forget")        # the largest 8 % of the window's change go back, tensor by tensor

Source: ignoring the top of a window's update, Sun et al. 2025 (arXiv 2504.09522); LoRA, Hu et al. 2021 (arXiv 2106.09685), the
adapters being peft's. ours: windows that are taken out after something else was learned.
"""

import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remanence.erasure import default_scope, sparse_delta, sparse_mask
from remanence.erasure._selection import Selection
from remanence.errors import SettingError
from remanence.keys import keyed_rng
from remanence.learner import Footprint
from remanence.state import State, copy_state
from remanence.weights._language import LanguageLearner

_ADAPTER = "window"


class LanguageFineTuning(LanguageLearner):
    """All weights of a language model follow the text; every task keeps the weights from before and after it.

    One optimizer runs through all tasks: a fresh AdamW would make its first steps in every weight alike. Its moments are shared
    knowledge and no part of what `forget` takes out.

    `forget` of a task after which nothing was learned gives, bit for bit, `sparse_delta(before, after, select, fraction)`;
    otherwise the removed part of the change is subtracted from the weights as they are now. A task costs two copies of
    the weights.

    Args:
        model: folder of a causal LM, or a module ids (B, T) -> logits (B, T, V); copied.
        epochs, batch_size, lr, fraction, select, seed, device: see `remanence.weights._language.LanguageLearner`.
    """

    def __init__(
        self, model: str | Path | nn.Module, epochs: int = 1, batch_size: int = 16, lr: float = 3e-4, fraction: float = 0.08,
        select: Selection = "ignore_top", seed: int = 0, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        super().__init__(model, epochs, batch_size, lr, fraction, select, seed, device)
        self.model.requires_grad_(True)
        self._start: dict[str, Tensor] = {}

    def _trained(self) -> list[nn.Parameter]:
        return list(self._weights().values())

    def _open(self, task: str) -> None:
        self._start = self._snapshot()
        if self._optimizer is None:
            self._open_optimizer()

    def _close(self) -> State:
        window = {"before": self._start, "after": self._snapshot()}
        self._start = {}
        return window

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._weights().items()}

    @torch.no_grad()
    def _take_out(self, window: State) -> None:
        after, scope = window["after"], default_scope(self.model)
        erased = sparse_delta(window["before"], after, self.select, self.fraction, scope=scope)
        for name, parameter in self._weights().items():
            old, new = after[name].to(parameter.device), erased[name].to(parameter.device)
            # an entry that nothing has touched since takes the very bits; a sum would round
            parameter.copy_(torch.where(parameter == old, new, parameter + (new - old)))

    def state_dict(self) -> State:
        return {**super().state_dict(), "start": dict(self._start)}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._start = copy_state(state["start"])


class LanguageLoRA(LanguageLearner):
    """Every task trains one low-rank adapter, which is merged into the weights at its end; the window keeps the factors only.

    `forget` computes the adapter's change scale * B A anew, masks it matrix by matrix, and subtracts what the mask removes: exact
    up to the rounding of a sum and a difference. The masks are those of `sparse_mask` on the product, never on a factor.

    Args:
        model: folder of a causal LM, or a module ids (B, T) -> logits (B, T, V) of which `modules` names linear layers; copied.
        epochs, batch_size, lr, fraction, select, seed, device: see `remanence.weights._language.LanguageLearner`.
        rank: r of the adapters.
        alpha: their scale is alpha / r.
        modules: suffixes of the linear layers that are adapted; None takes peft's choice for this kind of model.

    Raises:
        SettingError: rank or alpha is not above 0; `modules` matches no linear layer, or is None for a model that peft does not know.
    """

    def __init__(
        self, model: str | Path | nn.Module, epochs: int = 1, batch_size: int = 16, lr: float = 3e-4, fraction: float = 0.08,
        select: Selection = "ignore_top", seed: int = 0, device: str | torch.device = "cpu", rank: int = 8, alpha: float = 16,
        modules: tuple[str, ...] | None = None,
    ) -> None:  # fmt: skip
        for name, value in (("rank", rank), ("alpha", alpha)):
            if value <= 0:
                raise SettingError(f"LanguageLoRA: {name}={value} must be above 0.")
        super().__init__(model, epochs, batch_size, lr, fraction, select, seed, device)
        self.model.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.modules = self._chosen(modules)

    def _chosen(self, modules: tuple[str, ...] | None) -> tuple[str, ...]:
        linear = [name for name, module in self.model.named_modules() if _is_linear(module)]
        suffixes = sorted({name.rsplit(".", 1)[-1] for name in linear})
        if modules is None:
            from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

            kind = getattr(getattr(self.model, "config", None), "model_type", "")
            if kind not in KNOWN:
                name = kind or type(self.model).__name__
                raise SettingError(f"LanguageLoRA: peft has no choice of modules for '{name}'; give some of {suffixes}.")
            return tuple(KNOWN[kind])
        missing = [suffix for suffix in modules if not any(name.endswith(suffix) for name in linear)]
        if missing or not modules:
            raise SettingError(f"LanguageLoRA: modules {missing or modules} match no linear layer of the model; there are {suffixes}.")
        return tuple(modules)

    # --- the adapter -------------------------------------------------------------------------------------------

    def _layers(self) -> dict[str, Any]:
        """Adapted layers by name; empty when no task is being learned."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {name: module for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer)}

    def _attach(self, task: str) -> None:
        import peft

        config = peft.LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.modules), lora_dropout=0.0)
        with keyed_rng(self.seed, "adapter", task), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft finds out by itself how GPT-2 stores its matrices
            peft.inject_adapter_in_model(config, self.model, adapter_name=_ADAPTER)
        self.model.to(self.device).eval()

    def _factors(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {"A": layer.lora_A[_ADAPTER].weight, "B": layer.lora_B[_ADAPTER].weight} for name, layer in self._layers().items()
        }

    def _detach(self) -> None:
        for name, layer in self._layers().items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        self.model.__dict__.pop("peft_config", None)  # the next adapter would be warned of this one

    def _change(self, name: str, factors: dict[str, Tensor]) -> tuple[nn.Parameter, Tensor]:
        """A plain layer's matrix, and what the adapter adds to it."""
        layer: Any = self.model.get_submodule(name)
        product = self.alpha / self.rank * (factors["B"].to(self.device) @ factors["A"].to(self.device))
        weight: nn.Parameter = layer.weight
        return weight, (product if isinstance(layer, nn.Linear) else product.T).to(weight.dtype)

    # --- hooks -------------------------------------------------------------------------------------------------

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.model.named_parameters() if ".lora_" in name]

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name.replace(".base_layer.", "."): weight for name, weight in self.model.named_parameters() if ".lora_" not in name}

    def _open(self, task: str) -> None:
        self._detach()  # what a run that was closed left behind
        self._attach(task)
        self._open_optimizer()

    @torch.no_grad()
    def _close(self) -> State:
        factors = {name: copy_state(pair) for name, pair in self._factors().items()}
        self._detach()
        self._optimizer = None
        for name, pair in factors.items():
            weight, change = self._change(name, pair)
            weight.add_(change)
        return {"factors": {name: {key: value.cpu() for key, value in pair.items()} for name, pair in factors.items()}}

    @torch.no_grad()
    def _take_out(self, window: State) -> None:
        for name, factors in window["factors"].items():
            weight, change = self._change(name, factors)
            weight.sub_(change.masked_fill(sparse_mask(change, self.select, self.fraction), 0.0))

    # --- reading and state -------------------------------------------------------------------------------------

    def footprint(self) -> Footprint:
        """`trainable_parameters` are those of one adapter, also while none is being trained."""
        layers = [module for name, module in self.model.named_modules() if _is_linear(module) and self._is_adapted(name)]
        n_trained = sum(self.rank * sum(layer.weight.shape) for layer in layers)
        return replace(super().footprint(), trainable_parameters=n_trained)

    def _is_adapted(self, name: str) -> bool:
        return any(f".{name.removesuffix('.base_layer')}".endswith(f".{suffix}") for suffix in self.modules)

    def export(self, task: str | None = None) -> nn.Module:
        """The language model itself, a copy without gradients; an adapter that is still being trained is merged in it."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model)
        twin._close()
        model: nn.Module = twin.model
        return model.eval().requires_grad_(False)

    def state_dict(self) -> State:
        factors = {name: {key: value.detach() for key, value in pair.items()} for name, pair in self._factors().items()}
        return {**super().state_dict(), "adapter": factors}

    def load_state_dict(self, state: State) -> None:
        self._detach()
        if state["adapter"]:
            self._attach(state["cursor"]["task"])
            with torch.no_grad():
                for name, pair in self._factors().items():
                    for key, value in pair.items():
                        value.copy_(state["adapter"][name][key])
        super().load_state_dict(state)


def _is_linear(module: nn.Module) -> bool:
    """Whether peft adapts it as a matrix: a linear layer, or GPT-2's, which stores the transpose."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)
