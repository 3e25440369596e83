"""A stream of four-pixel images and a learner that counts: small enough to work every reading out by hand."""

import torch

from remanence.learner import STOP, Footprint, Learner, Prediction, Progress, require_learnable
from remanence.task import Data, Event, Stream, Task


def table(labels, first_id):
    """Images whose pixel number (label) is 1, so that the right answer can be read off them."""
    targets = torch.tensor(labels, dtype=torch.int64)
    return Data(torch.nn.functional.one_hot(targets, 4).float(), targets, torch.arange(first_id, first_id + len(labels)))


def pair(name, a, b, first_id, n_test=2):
    return Task(name, table([a, b] * 4, first_id), table([a, b] * n_test, first_id + 100))


FIRST, SECOND = pair("first", 0, 1, 0), pair("second", 2, 3, 1000)
BYSTANDER = Task("old", None, table([0, 0, 1, 1], 5000))
STRANGER = Task("stranger", None, Data(torch.zeros(2, 4), torch.tensor([70, 71]), torch.arange(6000, 6002)))


class ToyStream(Stream):
    name = "toy"

    def __init__(self, *events, mode="sequential", bystanders=()):
        self.events = [Event(verb, task) for verb, task in events]
        self.mode, self.bystanders = mode, bystanders

    def __len__(self):
        return len(self.events)

    def event(self, index):
        return self.events[index]


class Counting(Learner):
    """Sums the images of each class, two a step, and answers with the nearest sum; a step multiplies two 4x4 matrices."""

    store = "weights"
    readers = ("", "upside down")

    def __init__(self, batch=2):
        self.sums, self.batch = {}, batch

    def learn(self, task):
        return self._learn(task, require_learnable(self, task))

    def _learn(self, task, data):
        steps = data.steps(1, self.batch)
        torch.ones(3, 4) @ torch.ones(4, 4)  # set-up: 96 FLOPs
        for step in range(steps):
            torch.ones(4, 4) @ torch.ones(4, 4)  # 128 FLOPs
            for row in data.rows(step, self.batch, 0).tolist():
                label = str(int(data.targets[row]))
                self.sums[label] = self.sums.get(label, torch.zeros(4)) + data.inputs[row]
            if (yield Progress(step + 1, steps, 0.0, min(self.batch, len(data)))) == STOP:
                break
        torch.ones(1, 4) @ torch.ones(4, 1)  # consolidation: 8 FLOPs

    def predict(self, inputs, task=None, reader=""):
        classes = sorted(self.sums, key=int)
        weights = torch.stack([self.sums[label] for label in classes]) if classes else torch.zeros(0, 4)
        logits = inputs @ weights.T
        return Prediction(-logits if reader else logits, torch.tensor([int(label) for label in classes], dtype=torch.int64))

    def state_dict(self):
        return {"sums": dict(self.sums)}

    def load_state_dict(self, state):
        self.sums = {label: value.clone() for label, value in state["sums"].items()}

    def footprint(self):
        return Footprint(0, dict.fromkeys(self.sums, 16), 4 * len(self.sums))
