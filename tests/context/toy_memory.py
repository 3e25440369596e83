"""A language model of a few hundred numbers with the interface of `ContextLM`: its memory is a leaky sum of embeddings."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.keys import keyed_rng


@dataclass(frozen=True)
class ToyState:
    hidden: Tensor

    def detach(self):
        return ToyState(self.hidden.detach())

    def to(self, device):
        return ToyState(self.hidden.to(device))

    def index_select(self, rows):
        return ToyState(self.hidden[rows])

    def state_dict(self):
        return {"hidden": self.hidden}

    def fork(self):
        return replace(self, hidden=self.hidden.clone())


class ToyMemory(nn.Module):
    def __init__(self, vocab=12, width=6, dropout=0.0, seed=0):
        super().__init__()
        with keyed_rng("toy memory", seed):
            self.embedding, self.readout = nn.Embedding(vocab, width), nn.Linear(width, vocab)
        self.decay, self.dropout = nn.Parameter(torch.tensor(0.5)), nn.Dropout(dropout)
        self.read = []  # what every call got

    def init_state(self, batch):
        return ToyState(torch.zeros(batch, self.embedding.embedding_dim))

    def restore_state(self, state):
        return ToyState(state["hidden"])

    def forward(self, tokens, state=None, lengths=None, reset=None):
        hidden = (self.init_state(len(tokens)) if state is None else state).hidden
        self.read.append((tokens, lengths, self.training, hidden.requires_grad))
        outputs = []
        for place, vector in enumerate(self.dropout(self.embedding(tokens)).unbind(1)):
            begins = torch.zeros(len(tokens), dtype=torch.bool) if reset is None else reset[:, place]
            kept = hidden.masked_fill(begins[:, None], 0.0)
            fresh = self.decay * kept + vector
            hidden = fresh if lengths is None else torch.where((place < lengths)[:, None], fresh, kept)
            outputs.append(self.readout(hidden))
        return torch.stack(outputs, 1), ToyState(hidden)

    def loss(self, tokens, targets, state, lengths=None, reset=None):
        logits, state = self(tokens, state, lengths, reset)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100), state


def toy_documents(*lengths, vocab=11, seed=0):
    """Documents of random ids below `vocab`."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (n,), generator=source) for n in lengths]
