"""What is read from an untouched model: probability, losses, entropy, and priming without training."""

import math

import numpy as np
import pytest
import torch
from traced_world import FACTS, N_VOCABULARY, model, tokenizer

from remanence.errors import DataError, SettingError
from remanence.facts import Fact, FactSet
from remanence.probes import forecast


class Bigrams(torch.nn.Module):
    """Knows which word follows which: the logits of a word's successor are raised."""

    def __init__(self, pairs, strength=8.0):
        super().__init__()
        self.table = torch.nn.Embedding(N_VOCABULARY, N_VOCABULARY)
        torch.nn.init.zeros_(self.table.weight)
        names = tokenizer()
        for first, second in pairs:
            self.table.weight.data[names.convert_tokens_to_ids(first), names.convert_tokens_to_ids(second)] = strength

    def forward(self, ids):
        return self.table(ids)


SURE = 8 - math.log(math.exp(8) + N_VOCABULARY - 1)
EVEN = -math.log(math.exp(8) + N_VOCABULARY - 1)
UNIFORM = -math.log(N_VOCABULARY)


def test_probability_losses_and_entropy_are_those_of_the_bigrams():
    table = forecast(Bigrams([("joy", "is"), ("is", "vermilion"), ("met", "in"), ("in", "she"), ("she", "ate")]), FACTS, tokenizer())
    assert table["fact"].tolist() == ["joy", "city", "lunch"]
    assert np.allclose(table["log_p_before"], [SURE, EVEN, UNIFORM])
    assert table["surprising"].tolist() == [False, True, False]
    assert table["length"].tolist() == [3, 4, 3]
    # "they met in | Tirana": two tokens of the context are predicted, one of them surely
    assert np.allclose(table["context_loss"], [-SURE, -(UNIFORM + SURE) / 2, -SURE], atol=1e-5)
    assert np.allclose(table["text_loss"], [-SURE, -(UNIFORM + SURE + EVEN) / 3, -(SURE + UNIFORM) / 2], atol=1e-5)
    entropy = -(math.exp(SURE) * SURE + (N_VOCABULARY - 1) * math.exp(EVEN) * EVEN)
    assert np.allclose(table["entropy"], [entropy, entropy, -UNIFORM])


def test_the_threshold_is_a_parameter():
    net = Bigrams([])
    assert not forecast(net, FACTS, tokenizer())["surprising"].any()
    assert forecast(net, FACTS, tokenizer(), threshold=0.02)["surprising"].all()
    for threshold in (0, 1, -1e-3):
        with pytest.raises(SettingError, match=r"no probability between 0 and 1; the published one is 0.001"):
            forecast(net, FACTS, tokenizer(), threshold=threshold)


def test_no_facts_are_refused():
    with pytest.raises(DataError, match="there are no facts to forecast"):
        forecast(model(), FactSet(()), tokenizer())


def test_a_text_that_is_too_long_is_named():
    text = "she ate haggis" + " is" * 20
    facts = FactSet((*FACTS.facts, Fact("endless", "foods", "mundane", text, "haggis", "she ate")))
    with pytest.raises(DataError, match="fact 'endless' has 23 tokens, the model takes 16; shorten its text"):
        forecast(model(), facts, tokenizer())


def test_batches_and_padding_change_nothing():
    net = model()
    together = forecast(net, FactSet(FACTS.facts + tuple(_copies(40)), FACTS.prefixes), tokenizer(), in_context=True)
    alone = [forecast(net, FactSet((fact,), FACTS.prefixes), tokenizer()) for fact in FACTS]
    for row, single in zip(range(3), alone, strict=True):
        for column in ("log_p_before", "text_loss", "context_loss", "entropy"):
            assert together[column][row] == pytest.approx(single[column][0], abs=1e-5)
    assert together["fact"].tolist() == ["joy", "city", "lunch", *(f"copy {n}" for n in range(40))]


def _copies(n):
    texts = ["she ate haggis " + "is " * (index % 5) + "joy" for index in range(n)]
    return [Fact(f"copy {index}", "foods", "mundane", text, "haggis", "she ate") for index, text in enumerate(texts)]


def test_priming_in_context_is_the_change_by_reading_the_text():
    table = forecast(model(), FACTS, tokenizer(), in_context=True)
    names = tokenizer()

    def log_p(text, keyword):
        with torch.no_grad():
            logits = model().eval()(torch.tensor([names(text)["input_ids"]])).logits[0, -1]
        return float(logits.log_softmax(-1)[names.convert_tokens_to_ids(keyword)])

    changes = [
        log_p(f"joy is vermilion {prefix}", "vermilion") - log_p(prefix, "vermilion") for prefix in ("sand is", "grass is", "the sea is")
    ]
    assert table["in_context_priming"][0] == pytest.approx(np.median(changes), abs=1e-5)
    assert forecast(model(), FactSet(FACTS.facts), tokenizer(), in_context=True)["in_context_priming"].isna().all()
    some = FactSet(FACTS.facts, FACTS.prefixes[:3])
    assert forecast(model(), some, tokenizer(), in_context=True)["in_context_priming"].isna().tolist() == [False, True, True]


def test_a_context_of_one_token_has_no_loss():
    facts = FactSet((Fact("short", "foods", "mundane", "ate haggis", "haggis", "ate"),))
    table = forecast(model(), facts, tokenizer())
    assert math.isnan(table["context_loss"][0])
    assert math.isfinite(table["text_loss"][0])


def test_the_model_is_left_as_it_was():
    net = model().train()
    state = torch.get_rng_state()
    first = forecast(net, FACTS, tokenizer(), in_context=True)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert first.equals(forecast(net.eval(), FACTS, tokenizer(), in_context=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_bf16_weights_are_read_in_float32():
    whole, half = forecast(model(), FACTS, tokenizer()), forecast(model().bfloat16(), FACTS, tokenizer())
    assert np.allclose(whole["log_p_before"], half["log_p_before"], atol=0.05)
    assert np.isfinite(half["entropy"]).all()
