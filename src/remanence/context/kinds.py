"""The kinds of models in this room by name, and the way back from a folder to its model."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from remanence.context.block_recurrent import BlockRecurrentTransformer
from remanence.context.melodi import MelodiLM
from remanence.context.memorizing import MemorizingTransformer
from remanence.context.transformer_xl import TransformerXL
from remanence.errors import DataError
from remanence.parts.hosts import no_progress_bar


class Kind(NamedTuple):
    """A class of models, and the settings that make it this kind."""

    model: Any
    fixed: dict[str, Any]


KINDS = {
    "melodi": Kind(MelodiLM, {}),
    "transformer-xl": Kind(TransformerXL, {}),
    "memorizing": Kind(MemorizingTransformer, {}),
    "block-recurrent": Kind(BlockRecurrentTransformer, {}),
    "windowed": Kind(TransformerXL, {"cache": 0}),
}


def load_context_model(folder: str | Path) -> Any:
    """The model that `save_pretrained` wrote, of whichever kind, in evaluation mode.

    Raises:
        DataError: the folder holds no model of this room, or not all of its weights.
    """
    classes = {kind.model.config_class.model_type: kind.model for kind in KINDS.values()}
    folder = Path(folder).expanduser()
    if not (folder / "config.json").exists():
        raise DataError(
            f"{folder} holds no config.json; give a folder that `remanence context train`, or save_pretrained of a context model, wrote."
        )
    found = PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0].get("model_type")
    if found not in classes:
        raise DataError(f"{folder} holds a '{found}' model; the context models are {', '.join(sorted(classes))}.")
    with no_progress_bar():
        model, report = classes[found].from_pretrained(folder, local_files_only=True, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} tensors of its own config.json (first: {missing[0]}); they would be random. Save it anew."
        )
    return model.eval()
