"""The experiments in the order in which they run."""

import hypertransformer_continual_gates as later
import hypertransformer_few_shot_gates as few
from hypertransformer_sizes import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    "H1": Experiment("5-way 1-shot, 8 channels, equal steps", few.h1_cells, few.h1),
    "C1": Experiment("memory in the weights alone", later.c1_cells, later.c1),
    "C2": Experiment("no forgetting, task-incremental", later.stream_cells(()), later.c2),
    "C3": Experiment("class-incremental, against a constant embedding; C4a", later.c3_cells, later.c3),
    "H3": Experiment("all layers against logits only, by channels", few.h3_cells, few.h3),
    "H2": Experiment("5-way 1-shot, 8 channels, equal CPU time", few.h2_cells, few.h2),
    "H5": Experiment("against MAML, five second-order steps, equal CPU; adaptation", few.h5_cells, few.h5),
    "H7": Experiment("do the kernels depend on the task?", few.h7_cells, few.h7),
    "C4b": Experiment("recurrence over three domains", later.c4_cells, later.c4),
    "C5": Experiment("mini-batches of one task", later.c5_cells, later.c5),
    "C6": Experiment("ten tasks after training on three", later.c6_cells, later.c6),
    "C7": Experiment("cost of a step", later.c7_cells, later.c7),
    "C8": Experiment("order of the tasks", later.stream_cells(("nocarry",)), later.c8),
    "H6": Experiment("unlabelled images", few.h6_cells, few.h6),
    "speed": Experiment("batches of tasks, and what compiling buys", few.speed_cells, few.speed_of_batches),
    "reported": Experiment("one seed, not gated: 20 ways, 5 shots, 32 channels, generated heads", few.reported_cells, few.reported),
}
