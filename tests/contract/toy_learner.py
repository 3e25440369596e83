"""A small learner that keeps every rule: a table of weights per task, momentum, keyed noise; easy to break in one place."""

import torch
from torch import nn

from remanence.errors import DataError
from remanence.keys import generator
from remanence.learner import STOP, Cursor, Footprint, Learner, Prediction, Progress, require_learnable
from remanence.state import state_bytes


class Toy(Learner):
    store = "weights"

    def __init__(self, seed=0):
        self.seed, self.cursor, self.velocity = seed, Cursor(), None
        self.tables = {}

    def learn(self, task):
        return self._learn(task, require_learnable(self, task))

    def _learn(self, task, data):
        if self.cursor.begin("learn", task.name) == 0 and len(data):
            shape = (len(task.classes), data.inputs[0].numel())
            self.tables[task.name] = {"labels": list(task.classes), "weight": torch.zeros(shape)}
            self.velocity = torch.zeros(shape)
        n_steps = data.steps(2, 4)
        while self.cursor.step < n_steps:
            n_examples = self.step(task, data, self.cursor.step)
            self.cursor.step += 1
            if (yield Progress(self.cursor.step, n_steps, torch.tensor(0.5), n_examples)) == STOP:
                break
        self.velocity = None
        self.cursor.close()

    def step(self, task, data, step):
        rows = data.rows(step, 4, self.seed, "learn", task.name)
        pixels = data.inputs[rows].flatten(1)
        noise = torch.randn(pixels.shape, generator=generator(self.seed, "learn", task.name, step))
        table = self.tables[task.name]
        hit = (data.targets[rows][None] == torch.tensor(table["labels"])[:, None]).float()
        self.velocity = 0.9 * self.velocity + hit @ (pixels + 0.1 * noise) / len(rows)
        table["weight"] = table["weight"] + 0.1 * self.velocity
        return len(rows)

    def forget(self, task, retain=None):
        if task.name not in self.tables:
            raise DataError(f"'{task.name}' was never learned.")
        return self._forget(task.name)

    def _forget(self, name):
        if self.cursor.begin("forget", name) == 0:
            self.tables[name]["weight"] = torch.zeros_like(self.tables[name]["weight"])
        while self.cursor.step < 2:
            self.cursor.step += 1
            if (yield Progress(self.cursor.step, 2, None, 0)) == STOP:
                break
        del self.tables[name]
        self.cursor.close()

    @torch.no_grad()
    def predict(self, inputs, task=None, reader=""):
        tables = [self.tables[task]] if task in self.tables else list(self.tables.values())
        labels = sorted({label for table in tables for label in table["labels"]})
        rows = [torch.stack([t["weight"][t["labels"].index(k)] for t in tables if k in t["labels"]]).sum(0) for k in labels]
        weight = torch.stack(rows) if rows else torch.zeros(0, inputs[0].numel() if len(inputs) else 0)
        logits = inputs.flatten(1) @ weight.T if labels else inputs.new_zeros(len(inputs), 0)
        return Prediction(logits, torch.tensor(labels, dtype=torch.int64))

    def state_dict(self):
        return {"cursor": self.cursor.state_dict(), "velocity": self.velocity, "tables": {k: dict(v) for k, v in self.tables.items()}}

    def load_state_dict(self, state):
        self.cursor.load_state_dict(state["cursor"])
        self.velocity = None if state["velocity"] is None else state["velocity"].clone()
        self.tables = {k: {"labels": list(v["labels"]), "weight": v["weight"].clone()} for k, v in state["tables"].items()}

    def footprint(self):
        return Footprint(0, {name: state_bytes(table) for name, table in self.tables.items()})

    def export(self, task=None):
        if task not in self.tables:
            raise DataError("name a task.")
        weight = self.tables[task]["weight"]
        readout = nn.Linear(weight.shape[1], len(weight), bias=False)
        readout.load_state_dict({"weight": weight})
        return nn.Sequential(nn.Flatten(), readout).requires_grad_(False)
