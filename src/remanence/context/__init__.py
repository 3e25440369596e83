"""Knowledge in the context: models that read documents of any length and carry a state of bounded size."""

from remanence.context.attach import AttachedMelodi, AttachedMelodiConfig, AttachedMelodiState, attach_melodi, load_attached
from remanence.context.block_recurrent import BlockRecurrentState, BlockRecurrentTransformer
from remanence.context.configuration import BlockRecurrentConfig, ContextConfig, MelodiConfig, MemorizingConfig, TransformerXLConfig
from remanence.context.documents import DocumentReader, Segment
from remanence.context.evaluation import bits_by_position, document_losses
from remanence.context.kinds import load_context_model
from remanence.context.language_model import ContextLM
from remanence.context.learner import MelodiReader
from remanence.context.melodi import MelodiLM, MelodiState, QueueReads
from remanence.context.memorizing import MemorizingState, MemorizingTransformer
from remanence.context.model import ContextModel
from remanence.context.pretraining import PretrainedContextLM
from remanence.context.reading import Reading, begin_reading, load_reading, read_on, save_reading
from remanence.context.state import ContextState, load_context_state, save_context_state
from remanence.context.store import StateStore
from remanence.context.training import ContextTrainer
from remanence.context.transformer_xl import TransformerXL, TransformerXLState

__all__ = [
    "AttachedMelodi",
    "AttachedMelodiConfig",
    "AttachedMelodiState",
    "BlockRecurrentConfig",
    "BlockRecurrentState",
    "BlockRecurrentTransformer",
    "ContextConfig",
    "ContextLM",
    "ContextModel",
    "ContextState",
    "ContextTrainer",
    "DocumentReader",
    "MelodiConfig",
    "MelodiLM",
    "MelodiReader",
    "MelodiState",
    "MemorizingConfig",
    "MemorizingState",
    "MemorizingTransformer",
    "PretrainedContextLM",
    "QueueReads",
    "Reading",
    "Segment",
    "StateStore",
    "TransformerXL",
    "TransformerXLConfig",
    "TransformerXLState",
    "attach_melodi",
    "begin_reading",
    "bits_by_position",
    "document_losses",
    "load_attached",
    "load_context_model",
    "load_context_state",
    "load_reading",
    "read_on",
    "save_context_state",
    "save_reading",
]
