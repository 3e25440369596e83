"""A made-up run with the shape of a real one: six learners, three seeds, five tasks, then one is forgotten."""

import json
import math

from remanence.ledger import Ledger, Row

TASKS = [f"digits {2 * k}-{2 * k + 1}" for k in range(5)]
EVIL = '<i>Mine</i> & "co"</script>'
# name -> store, share kept per later event, bytes per task, supports forgetting, accuracy left after forgetting
LEARNERS = {
    "FineTune": ("weights", 0.25, 90_000, True, 0.3),
    "Replay": ("weights", 0.97, 160_000, True, 0.05),
    "LoRA": ("weights", 0.9, 12_000, False, 0.9),
    "MemoryTokens": ("tokens", 0.99, 2_600, True, 0.0),
    "Prototypes": ("context", 1.0, 520, True, 0.0),
    EVIL: ("peers", 0.8, 40_000, True, 0.2),
}
STEPS, SIZE = 60, 16


def rows_of(learner, seed, stream="split digits"):
    store, kept, n_bytes, forgets, left = LEARNERS[learner]
    rows = []

    def add(event, probe, subject, metric, value, step=None, at=None, unit="1", note=""):
        verb = "" if event < 0 else "forget" if event == 5 else "learn"
        task = "" if event < 0 else TASKS[1] if event == 5 else TASKS[event]
        place = ("feedbeef", stream, learner, store, seed, event, verb, task, step)
        rows.append(Row(*place, probe, "", subject, metric, at, value, unit, metric != "seconds", note))

    def accuracy(position, event, share=1.0):
        if event < position:
            return 0.0
        noise = 0.01 * math.sin(7 * seed + position + 3 * event)
        top = 0.97 - 0.01 * position
        return max(0.0, min(1.0, top * (share if event == position else kept ** (event - position - 1 + share)) + noise))

    for event in range(-1, 5):
        for position, name in enumerate(TASKS):
            add(event, "accuracy", name, "accuracy", accuracy(position, event))
            add(event, "accuracy", name, "chance", 1 / (2 * event + 2) if 0 <= position <= event else 0.0)
            if event >= 0:
                for step in (1, 2, 4, 8, 16, 32):
                    add(event, "accuracy", name, "accuracy", accuracy(position, event, 1 - math.exp(-step / 6)), step=step)
        add(event, "bystanders", "letters", "accuracy", 0.92 - 0.03 * (event + 1) * (1 - kept))
        if event >= 0:
            add(event, "run", TASKS[event], "n_train", 280.0, unit="example")
            add(event, "membership", TASKS[event], "membership_auc", 0.6 + 0.01 * seed)
            costs = {"steps": STEPS, "examples": STEPS * SIZE, "seconds": 0.8 + 0.1 * seed, "peak_memory_bytes": 3e8}
            for metric, value in costs.items():
                add(event, "run", "", metric, float(value))
            for metric, value in {
                "total_bytes": n_bytes * (event + 1),
                "trainable_parameters": n_bytes / 4,
                "flops_learn": 4e9,
            }.items():
                add(event, "cost", "", metric, float(value))
    note = "" if forgets else f"{learner} cannot take '{TASKS[1]}' out again. Train anew without it."
    add(5, "run", "", "erasure_supported", float(forgets), note=note)
    add(5, "run", "", "steps", 20.0 if forgets else 0.0)
    for position, name in enumerate(TASKS):
        value = accuracy(position, 4)
        add(5, "accuracy", name, "accuracy", value * left if position == 1 and forgets else value)
    if forgets:
        add(5, "membership", TASKS[1], "membership_auc", 0.51)
        for at in (0, 16, 32, 64, 128, 256, 512):
            add(5, "relearning", TASKS[1], "relearn_accuracy", 0.97 - (0.97 - left * kept) * math.exp(-at / 60), at=at)
            add(5, "relearning", TASKS[1], "fresh_accuracy", 0.97 - 0.97 * math.exp(-at / 120), at=at)
    return rows


def write_run(folder, learners=tuple(LEARNERS), seeds=(0, 1, 2)):
    cells = []
    for index, learner in enumerate(learners):
        for seed in seeds:
            cells.append(f"{index}-{seed}")
            Ledger(folder / "cells" / cells[-1] / "ledger.jsonl").append(rows_of(learner, seed))
    manifest = {
        "recipe": {"name": "synthetic"},
        "name": "Five times two digits <tasks>",
        "run": "feedbeef",
        "command": "remanence run synthetic --set epochs=2",
        "cells": cells,
        "seeds": list(seeds),
        "environment": {"python": "3.11.2", "torch": "2.13.0", "remanence": "0.1.0", "cpu": "two cores", "commit": "c42d75d"},
        "expect": "Replay keeps more than FineTune.",
    }
    (folder / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder
