"""Every kind of model that documents are read with, its sizes over bytes, and the four texts that it is trained and asked on."""

from remanence.context import (
    BlockRecurrentConfig,
    BlockRecurrentTransformer,
    MelodiConfig,
    MelodiLM,
    MemorizingConfig,
    MemorizingTransformer,
    TransformerXL,
    TransformerXLConfig,
)
from remanence.streams import TextSource

KINDS = {
    "melodi": (MelodiLM, MelodiConfig, {"short": 2, "long_per_window": 2, "long_windows": 6, "long_layers": (1,)}),
    "transformer-xl": (TransformerXL, TransformerXLConfig, {"cache": 8}),
    "windowed": (TransformerXL, TransformerXLConfig, {"cache": 0}),
    "memorizing": (MemorizingTransformer, MemorizingConfig, {"cache": 4, "memory": 16, "memory_layer": 1}),
    "block-recurrent": (BlockRecurrentTransformer, BlockRecurrentConfig, {"cache": 4, "states": 3, "recurrent_layer": 1}),
}

BYTES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "window": 16}
SIZES = {kind: BYTES | settings for kind, (_, _, settings) in KINDS.items() if kind != "windowed"}
SIZES = {kind: {key: 16 if key in ("cache", "memory") else value for key, value in size.items()} for kind, size in SIZES.items()}
SIZES["melodi"] |= {"long_layers": [1]}  # as a recipe has it
SIZES["windowed"] = BYTES

SOURCE = TextSource(
    "four texts",
    train=tuple(f"train {key}: " + "abc " * 60 for key in range(2)),
    test=("short", *(" ".join(str(key + n * n) for n in range(200)) for key in range(3))),
)
