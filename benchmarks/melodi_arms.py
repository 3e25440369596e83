"""The models that the MELODI benchmark compares: one body, and what each of them carries from one window to the next.

An arm is a name for a class and the settings in which it differs from the body. The memories of A1 in floats per document, keys and values
counted: MELODI 137,216; Transformer-XL 65,536 with a cache of one window, 131,072 with two; Memorizing Transformer 1,097,728.
"""

from typing import Any, NamedTuple

from remanence.keys import keyed_rng


class Arm(NamedTuple):
    """A class by name, and its own settings."""

    model: str
    config: dict[str, Any]

    def but(self, **changes: Any) -> "Arm":
        """The same class with other settings."""
        return Arm(self.model, self.config | changes)


MELODI = Arm("MelodiLM", {"short": 12, "long_per_window": 8, "long_windows": 64, "long_layers": [2]})
XL = Arm("TransformerXL", {"cache": 64})

COMPARED = {
    "melodi": MELODI, "transformer-xl": XL,
    "memorizing": Arm("MemorizingTransformer", {"cache": 64, "memory": 4096, "memory_layer": 2}),
}  # fmt: skip
"""A1, all seeds."""

COMPARED_ONCE = {
    "transformer-xl, equal memory": XL.but(cache=128), "windowed": XL.but(cache=0),
    "block-recurrent": Arm("BlockRecurrentTransformer", {"cache": 64, "states": 64}),
}  # fmt: skip
"""A1, one seed."""

RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
"""Peak rates that A0 tries for every arm of A1; 2e-3 is far from enough within a thousand steps."""

CHOSEN = dict.fromkeys(COMPARED | COMPARED_ONCE, 1.6e-2) | dict.fromkeys(("transformer-xl, equal memory", "block-recurrent"), 8e-3)
"""The best of them, by arm; ablations of MELODI have MELODI's."""

FULL_RATES = (8e-3, 1.6e-2)
"""Rates of full attention, which has one document a step where the others have eight; the better one counts."""

ABLATED = {"short only": MELODI.but(long_per_window=0), "long only": MELODI.but(short=0, summary=12)}
"""A3, paired seeds."""

ABLATED_ONCE = {
    "no branching": MELODI.but(branching=False),
    "mixers without residual": MELODI.but(mixer_residual=False),
    "queue in layer 1": MELODI.but(long_layers=[1]),
    "queue in layer 3": MELODI.but(long_layers=[3]),
    "queues in layers 1 and 3": MELODI.but(long_layers=[1, 3]),
    "L = 0 (short only)": ABLATED["short only"],
    "L = 4": MELODI.but(long_per_window=4),
    "L = 16": MELODI.but(long_per_window=16),
    "gate of every token": MELODI.but(gate="token"),
    "tokens attend to themselves": MELODI.but(attend_self=True),
}
"""A3, one seed; the full model has its queue in layer 2, L = 8, a static gate and the strict mask."""

FULL_ATTENTION = XL.but(cache=0, window=4096)
"""A4: one window of 4,096 tokens, in which every layer sees all before; as far as MELODI's queue reaches back."""

RECALL_MELODI = Arm("MelodiLM", {"short": 8, "long_per_window": 8, "long_windows": 32, "long_layers": [2]})
RECALL = {"melodi": RECALL_MELODI}
"""A2, all seeds; windows of 32."""

RECALL_ONCE = {
    "transformer-xl": XL.but(cache=32), "windowed": XL.but(cache=0), "queue off": RECALL_MELODI.but(long_per_window=0),
    "short off": RECALL_MELODI.but(short=0, summary=8),
}  # fmt: skip


def make(model: str, config: dict[str, Any], seed: int) -> Any:
    """The model of an arm, untrained; initialisation is keyed by the seed.

    Args:
        model: name of a class of `remanence.context`.
        config: settings of its configuration class; what is not given is that of the body (d = 128, n = 4, h = 4, W = 64).
    """
    import remanence.context as context

    kind = getattr(context, model)
    with keyed_rng(seed, "initialise"):
        return kind(kind.config_class(**config))
