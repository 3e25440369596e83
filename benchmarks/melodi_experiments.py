"""The experiments in the order in which they run."""

import melodi_gates as gates
from melodi_cells import Bench, Cell
from melodi_sizes import Experiment, Judged, Size


def _speed_cells(size: Size) -> list[Cell]:
    """None: times are taken one after the other, by `judge`, and not kept."""
    return []


def _speed(bench: Bench, size: Size) -> Judged:
    from melodi_speed import judge  # what it times against is imported only when times are asked for

    found: Judged = judge(bench, size)
    return found


EXPERIMENTS: dict[str, Experiment] = {
    "A0": Experiment("the rate of every arm of A1", gates.a0_cells, gates.a0),
    "A1": Experiment("bits per byte on long documents, against the baselines", gates.a1_cells, gates.a1),
    "A1-long": Experiment("MELODI and Transformer-XL with twice the training: two seeds, reported", gates.a1_long_cells, gates.a1_long),
    "A2": Experiment("recall of pairs over many windows", gates.a2_cells, gates.a2),
    "A3": Experiment("what each memory is good for", gates.a3_cells, gates.a3),
    "A3-once": Experiment("what each part is good for: one seed, reported", gates.a3_once_cells, gates.a3_once),
    "A4": Experiment("the same body with full attention within blocks of 4,096 tokens, at equal tokens", gates.a4_cells, gates.a4),
    "A5": Experiment("tokens a second: training, reading, writing", _speed_cells, _speed),
}
