"""Runs cells in forked children and kills them: FOLDER N_KILLS SEED. Imports torch once; every child is a real process.

Writes FOLDER/KIND/reference (never killed) and FOLDER/KIND/killed-N (killed N_KILLS times in all, then finished), and
prints what happened as JSON.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from list_stream import ListStream
from transformers import ViTConfig, ViTModel

from remanence.errors import CellBusy
from remanence.keys import keyed_rng
from remanence.probes import Accuracy
from remanence.runner import CellRunner
from remanence.testing import tiny_tasks
from remanence.weights import EWC, LoRA, Prototypes, Replay

TASKS = tiny_tasks(3, n_train=24, n_test=8)


def backbone():
    size = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1}
    with keyed_rng("kill"):
        return ViTModel(ViTConfig(**size, num_attention_heads=2, intermediate_size=32), add_pooling_layer=False)


VIT = backbone()
KINDS = {
    "EWC": lambda: EWC(VIT, epochs=1, batch_size=4, forget_epochs=1),
    "LoRA": lambda: LoRA(VIT, rank=2, epochs=1, batch_size=4),
    "prototypes": lambda: Prototypes(VIT, batch_size=2),
    "replay": lambda: Replay(VIT, budget_bytes=20 * 272, replay_size=4, epochs=1, batch_size=4, forget_epochs=1),
}


def run_cell(kind, folder):
    events = [*(("learn", task) for task in TASKS), ("forget", TASKS[1])]
    CellRunner(ListStream(*events), KINDS[kind], [Accuracy(at=1)], folder, ("run", "list", kind), 0, 0.02).run()


def start(kind, folder):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run_cell(kind, folder)
            status = 0
        except CellBusy:
            status = 3
        finally:
            os._exit(status)
    return child


def ended(child):
    """Exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_finish(kind, base, n_kills, seconds, chance):
    """Kill at random moments; returns the statuses of all children and how many folders were used."""
    statuses, folders = [], 1
    while statuses.count(-signal.SIGKILL) < n_kills:
        child = start(kind, base / f"killed-{folders}")
        time.sleep(chance.uniform(0.0, 0.3 * seconds))
        os.kill(child, signal.SIGKILL)
        statuses.append(ended(child))
        folders += statuses[-1] == 0  # it was done before the kill: the remaining kills need another cell
    statuses.append(ended(start(kind, base / f"killed-{folders}")))
    return statuses, folders


def busy(folder):
    """Status of a second process on a cell at which a first one works."""
    first = start("replay", folder)
    while not (folder / "ledger.jsonl").exists():
        time.sleep(0.005)
    os.kill(first, signal.SIGSTOP)
    second = ended(start("replay", folder))
    os.kill(first, signal.SIGCONT)
    return {"second": second, "first": ended(first)}


def main(folder, n_kills, seed):
    torch.set_num_threads(1)
    told = {}
    for kind in KINDS:
        began = time.perf_counter()
        reference = ended(start(kind, folder / kind / "reference"))
        seconds = time.perf_counter() - began
        chance = random.Random(f"{seed} {kind}")
        statuses, folders = kill_and_finish(kind, folder / kind, n_kills, seconds, chance)
        told[kind] = {"reference": reference, "statuses": statuses, "folders": folders, "seconds": round(seconds, 2)}
    print(json.dumps({"kinds": told, "busy": busy(folder / "busy")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
