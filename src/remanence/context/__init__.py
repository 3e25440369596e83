"""Knowledge in the context: models that read documents of any length and carry a state of bounded size."""

from remanence.context.configuration import ContextConfig, MelodiConfig, TransformerXLConfig
from remanence.context.language_model import ContextLM, load_context_model
from remanence.context.melodi import MelodiLM, MelodiState
from remanence.context.state import ContextState, load_context_state, save_context_state
from remanence.context.transformer_xl import TransformerXL, TransformerXLState

__all__ = [
    "ContextConfig",
    "ContextLM",
    "ContextState",
    "MelodiConfig",
    "MelodiLM",
    "MelodiState",
    "TransformerXL",
    "TransformerXLConfig",
    "TransformerXLState",
    "load_context_model",
    "load_context_state",
    "save_context_state",
]
