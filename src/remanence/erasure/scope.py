"""Which tensors a sparse update masks: all 2-D weights but embeddings and norms, each storage once.

    in_scope = default_scope(model)                      # asks the model which of its modules are embeddings
    in_scope = default_scope(include_embeddings=True)    # a bare state: goes by names (wte, embed_tokens, lm_head, ...)
    in_scope = lambda name, tensor: ".mlp." in name      # or your own

Input and output embeddings stay out by default because the keyword's own row lies there: masking them too is a separate switch,
to be reported as such. An untied output layer counts as an embedding.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from remanence.errors import SettingError

Scope = Callable[[str, Tensor], bool]
StateDict = Mapping[str, Tensor]

_EMBEDDING = re.compile(
    r"(^|\.)(wte|wpe|shared|embed_(tokens|positions|in|out)|(\w+_)?embeddings?|tok_embeddings|lm_head|output_projection)(\.|$)"
)
_NORM = re.compile(r"(^|\.)(ln_?\w*|\w*norm\w*)(\.|$)", re.IGNORECASE)
_PACKED = re.compile(r"\.(SCB|absmax|quant_map|quant_state\S*|qweight|qzeros)$")
_ADAPTER = re.compile(r"(^|\.)lora_(A|B|embedding_A|embedding_B)(\.|$)")
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


def default_scope(model: nn.Module | None = None, include_embeddings: bool = False) -> Scope:
    """The usual scope: 2-D floating-point weights, without norms and, unless asked for, without embeddings.

    Args:
        model: asked for its embedding and norm modules; without it, names alone decide.
        include_embeddings: input and output embeddings are masked as well.

    Returns:
        (name, tensor) -> whether the tensor is masked.

    Example:
        >>> inside = default_scope()
        >>> inside("h.0.mlp.weight", torch.zeros(2, 2)), inside("wte.weight", torch.zeros(2, 2)), inside("h.0.mlp.bias", torch.zeros(2))
        (True, False, False)
    """
    embeddings, norms = _module_names(model) if model is not None else (set(), set())

    def inside(name: str, tensor: Tensor) -> bool:
        if tensor.dim() != 2 or not tensor.is_floating_point() or name in norms or _NORM.search(name):
            return False
        return include_embeddings or not (name in embeddings or _EMBEDDING.search(name))

    return inside


def _module_names(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the parameters of embedding modules, and of norms; tied parameters under each of their names."""
    embedding_modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, ask)()
        except (AttributeError, NotImplementedError):
            continue
        embedding_modules += [found] if isinstance(found, nn.Module) else []
    norm_modules = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return _names_of(model, embedding_modules), _names_of(model, norm_modules)


def _names_of(model: nn.Module, modules: list[nn.Module]) -> set[str]:
    own = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in own}


def scoped_names(state: StateDict, scope: Scope, tied: Mapping[str, str]) -> list[str]:
    """The tensors to be masked, sorted; a tied storage stands under its first name, and only if all its names are in scope.

    Raises:
        SettingError: nothing is in scope, weights are quantised, or they are those of an unmerged adapter.
    """
    refuse_packed(state)
    outside = {tied.get(name, name) for name, tensor in state.items() if not scope(name, tensor)}
    names = sorted(name for name in state if name not in tied and name not in outside)
    if not names:
        raise SettingError(
            f"none of {len(state)} tensors is in scope (first three: {sorted(state)[:3]}); by default that takes a 2-D float weight "
            "that is no embedding and no norm. Pass scope=... to choose others."
        )
    whole = [name for name in names if not state[name].is_floating_point()]
    if whole:
        raise SettingError(f"scope takes {whole[:3]}, of dtype {state[whole[0]].dtype}; only floating-point tensors have a change to mask.")
    return names


def refuse_packed(state: StateDict) -> None:
    """Refuse weights that have no plain change to rank.

    Raises:
        SettingError: a weight is quantised, or belongs to an unmerged adapter.
    """
    packed = sorted(name for name, tensor in state.items() if _PACKED.search(name) or _is_packed(name, tensor))
    if packed:
        raise SettingError(
            f"{len(packed)} tensors are quantised (first three: {packed[:3]}); a sparse update needs the weights as plain floats. "
            "Load both models without quantisation."
        )
    adapters = sorted(name for name in state if _ADAPTER.search(name))
    if adapters:
        raise SettingError(
            f"{len(adapters)} tensors belong to an unmerged LoRA adapter (first three: {adapters[:3]}); a mask on its factors is no mask "
            "on their product. Merge it (peft's merge_and_unload) and take sparse_delta(base, merged)."
        )


def _is_packed(name: str, tensor: Tensor) -> bool:
    if type(tensor).__name__ in ("Params4bit", "Int8Params"):
        return True
    return name.endswith("weight") and (tensor.dtype in _INTEGERS or tensor.element_size() == 1)


def tied_names(*states: StateDict) -> dict[str, str]:
    """Names whose storage stands under an earlier name already, in every one of the states -> that name.

    A state that was copied tensor by tensor has lost its ties; there, equal values under both names count as a tie.
    """
    first_of: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in states[-1].items():
        if tensor.numel() == 0 or tensor.data_ptr() == 0:
            continue
        first = first_of.setdefault((tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
        if first != name and all(_agree(state, first, name) for state in states[:-1]):
            tied[name] = first
    return tied


def _agree(state: StateDict, first: str, second: str) -> bool:
    return state[first].data_ptr() == state[second].data_ptr() or torch.equal(state[first], state[second])

