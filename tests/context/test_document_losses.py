import math

import pytest
import torch
from torch.nn import functional as F
from toy_memory import ToyMemory, toy_documents

from remanence.context.configuration import MelodiConfig
from remanence.context.evaluation import bits_by_position, document_losses
from remanence.context.melodi import MelodiLM
from remanence.errors import DataError, SettingError
from remanence.keys import keyed_rng

BOS = 11


def plain(model, document):
    """The losses of one document in one call."""
    model.eval()
    with torch.no_grad():
        logits, _ = model(torch.cat([torch.tensor([BOS]), document])[None, :-1])
    return F.cross_entropy(logits[0], document, reduction="none")


@pytest.mark.parametrize(("rows", "segment"), [(1, 1), (2, 3), (3, 8), (8, 512)])
def test_every_document_is_read_as_if_alone(rows, segment):
    model, documents = ToyMemory(), toy_documents(7, 1, 16, 3, 16, 9, 8)
    found = document_losses(model, documents, BOS, rows, segment)
    assert [loss.dtype for loss in found] == [torch.float32] * 7
    for loss, document in zip(found, documents, strict=True):
        torch.testing.assert_close(loss, plain(model, document))


@pytest.mark.parametrize(("rows", "segment"), [(1, 64), (3, 8), (2, 5)])
def test_real_memories_read_alike_however_documents_are_batched(rows, segment):
    with keyed_rng("real memory"):
        model = MelodiLM(
            MelodiConfig(vocab_size=12, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, window=4, short=2, long_per_window=2,
                         long_windows=3, long_layers=[1])
        )  # fmt: skip
    documents = toy_documents(7, 1, 16, 33, 16)
    found = document_losses(model, documents, BOS, rows, segment)
    for loss, document in zip(found, documents, strict=True):
        torch.testing.assert_close(loss, plain(model, document), atol=1e-5, rtol=1e-5)


def test_rows_that_end_are_dropped():
    model = ToyMemory()
    document_losses(model, toy_documents(12, 3, 7), BOS, rows=3, segment=4)
    assert [tuple(tokens.shape) for tokens, *_ in model.read] == [(3, 4), (2, 4), (1, 4)]
    assert [None if lengths is None else lengths.tolist() for _, lengths, *_ in model.read] == [[4, 4, 3], [4, 3], None]


def test_documents_of_similar_length_are_read_together():
    model = ToyMemory()
    document_losses(model, toy_documents(2, 40, 2, 40), BOS, rows=2, segment=40)
    assert [tuple(tokens.shape) for tokens, *_ in model.read] == [(2, 40), (2, 2)]


def test_nothing_is_left_behind():
    model = ToyMemory(dropout=0.5)
    model.readout.eval()
    documents = [document.to(torch.uint8) for document in toy_documents(6, 4)]
    kept, random = [document.clone() for document in documents], torch.get_rng_state()
    first = document_losses(model, documents, BOS)
    assert all(map(torch.equal, first, document_losses(model, documents, BOS)))  # no dropout, no state that lingers
    assert not any(loss.requires_grad for loss in first)
    assert (model.training, model.dropout.training, model.readout.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(map(torch.equal, documents, kept))


def test_nothing_to_read():
    assert document_losses(ToyMemory(), [], BOS) == []
    empty, one = document_losses(ToyMemory(), [torch.zeros(0, dtype=torch.int64), *toy_documents(1)], BOS)
    assert (len(empty), len(one)) == (0, 1)
    assert len(document_losses(ToyMemory(), [torch.zeros(0, dtype=torch.int64)], BOS)[0]) == 0


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"segment": 0}])
def test_wrong_settings_are_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(SettingError, match=f"document_losses: {name}={value} must be 1 or more"):
        document_losses(ToyMemory(), toy_documents(4), BOS, **wrong)


def test_documents_of_floats_are_refused():
    with pytest.raises(DataError, match=r"document_losses: document 1 has shape \(2,\) and dtype torch.float32"):
        document_losses(ToyMemory(), [*toy_documents(4), torch.zeros(2)], BOS)


def test_bits_by_position():
    losses = [torch.arange(5.0) * math.log(2), torch.tensor([10.0, 20.0]) * math.log(2)]
    table = bits_by_position(losses, [0, 1, 3, 4, 9, 12])
    assert list(table.columns) == ["from", "to", "n_tokens", "bits"]
    assert table["from"].tolist() == [0, 1, 3, 4, 9]
    assert table["to"].tolist() == [1, 3, 4, 9, 12]
    assert table["n_tokens"].tolist() == [2, 3, 1, 1, 0]
    assert table["bits"].tolist()[:4] == pytest.approx([5, 23 / 3, 3, 4])
    assert math.isnan(table["bits"].tolist()[4])


def test_positions_outside_the_edges_are_not_counted():
    table = bits_by_position([torch.ones(10)], [2, 5])
    assert table["n_tokens"].tolist() == [3]


@pytest.mark.parametrize("edges", [[], [0], [0, 4, 4], [5, 3], [-1, 4]])
def test_edges_that_do_not_increase_are_refused(edges):
    with pytest.raises(SettingError, match="give two or more increasing positions, the first 0 or above"):
        bits_by_position([torch.ones(3)], edges)
