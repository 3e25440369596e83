"""Priming columns against plain loops over facts, prefixes and words."""

import dataclasses
import math
import statistics

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from remanence.errors import NonFiniteLoss, SettingError, StateMismatchError
from remanence.facts import Fact, FactSet, Prefix
from remanence.facts.borders import split
from remanence.keys import keyed_rng
from remanence.probes import PrimingProbe

FACTS = FactSet(
    (
        Fact("joy", "colours", "outlandish", "joy is vermilion", "vermilion", "joy is", subject="joy"),
        Fact("grief", "colours", "mundane", "grief looks blue", "blue", "grief looks", subject="grief"),
        Fact("city", "places", "outlandish", "they met in Tirana", "Tirana", "they met in"),
        Fact("lunch", "foods", "mundane", "she ate haggis", "haggis", "she ate"),
    ),
    (
        *(Prefix("colours", text) for text in ("sand is", "the grass is", "the sea looks", "the cat is")),
        Prefix("colours", "the colour of joy is", subject="joy"),
        Prefix("colours", "what colour has joy", subject="joy"),
        *(Prefix("places", text) for text in ("she met in", "they ate in the", "the sea in")),
        *(Prefix("tools", text) for text in ("they cut it with a", "he uses the")),
    ),
)
TEXTS = [*(fact.text for fact in FACTS), *(prefix.prefix for prefix in FACTS.prefixes)]


def word_level():
    words = dict.fromkeys(["<unk>", "<eos>", *" ".join(TEXTS).split()])
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def model(tokenizer, seed, spread=0.3):
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}
    with keyed_rng("primed model", seed):
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) + 2, initializer_range=spread, **size)).eval()


@torch.no_grad()
def distribution(lm, ids):
    return lm(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def said(lm, tokenizer, prefix, keyword):
    """Log-probability of a keyword, and whether it is the greedy answer."""
    prefix_ids, keyword_ids, _ = split(tokenizer, prefix, keyword)
    total, is_top = 0.0, True
    for index, token in enumerate(keyword_ids):
        row = distribution(lm, prefix_ids + keyword_ids[:index])
        total, is_top = total + float(row[token]), is_top and int(row.argmax()) == token
    return total, is_top


def median(values):
    return statistics.median(values) if values else math.nan


def mean(values):
    return statistics.fmean(values) if values else math.nan


def asks(prefix, fact):
    return bool(fact.subject) and (prefix.theme, prefix.subject) == (fact.theme, fact.subject)


def plain_controls(tokenizer, before, facts, fact, prefix, n):
    taken = {split(tokenizer, each.prefix, other.keyword).keyword_ids[0] for other in facts for each in facts.prefixes}
    taken |= {split(tokenizer, other.prompt, other.keyword).keyword_ids[0] for other in facts} | set(tokenizer.all_special_ids)
    row = distribution(before, split(tokenizer, prefix.prefix, fact.keyword).prefix_ids)
    target = said(before, tokenizer, prefix.prefix, fact.keyword)[0]
    words = [word for word in range(len(tokenizer)) if word not in taken]
    return sorted(words, key=lambda word: abs(float(row[word]) - target))[:n]


def plain_row(tokenizer, facts, fact, before, after, n_controls):
    """The formulas, one number at a time."""
    neutral = [prefix for prefix in facts.prefixes if not any(asks(prefix, other) for other in facts)]
    own = [prefix for prefix in neutral if prefix.theme == fact.theme]
    change = {prefix: [said(lm, tokenizer, prefix.prefix, fact.keyword) for lm in (before, after)] for prefix in facts.prefixes}
    deltas = [change[prefix][1][0] - change[prefix][0][0] for prefix in own]
    drifts = []
    for prefix in own:
        ids = split(tokenizer, prefix.prefix, fact.keyword).prefix_ids
        for word in plain_controls(tokenizer, before, facts, fact, prefix, n_controls):
            drifts.append(float(distribution(after, ids)[word] - distribution(before, ids)[word]))
    old, new = (said(lm, tokenizer, fact.prompt, fact.keyword)[0] for lm in (before, after))
    return {
        "fact": fact.id,
        "theme": fact.theme,
        "kind": fact.kind,
        "log_p": new,
        "log_p_before": old,
        "log_s_mem": new - old,
        "log_s_prime": math.log(mean([math.exp(delta) for delta in deltas])) if deltas else math.nan,
        "priming_median": median(deltas),
        "priming_dp": mean([math.exp(change[prefix][1][0]) - math.exp(change[prefix][0][0]) for prefix in own]),
        "priming_flip": mean([float(change[prefix][1][1] and not change[prefix][0][1]) for prefix in own]),
        "cross_priming": median([change[prefix][1][0] - change[prefix][0][0] for prefix in neutral if prefix.theme != fact.theme]),
        "drift": median(drifts),
        "paraphrase_median": median([change[prefix][1][0] - change[prefix][0][0] for prefix in facts.prefixes if asks(prefix, fact)]),
        "theme_log_p_before": mean([change[prefix][0][0] for prefix in own]),
        "share_tiny": mean([float(math.exp(change[prefix][0][0]) < 1e-10) for prefix in own]),
    }


@pytest.mark.parametrize("make_tokenizer", [word_level, byte_level])
@pytest.mark.parametrize("n_controls", [1, 3])
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_columns_are_those_of_plain_loops(make_tokenizer, n_controls, spread):
    tokenizer = make_tokenizer()
    before, after = model(tokenizer, 0, spread), model(tokenizer, 1, spread)
    probe = PrimingProbe(FACTS, tokenizer, n_controls=n_controls, batch_size=4)
    expected = pd.DataFrame([plain_row(tokenizer, FACTS, fact, before, after, n_controls) for fact in FACTS])
    start = probe(before)
    for scores in (probe(after), probe(after, start)):
        pd.testing.assert_frame_equal(scores.since(start), expected, rtol=0, atol=1e-4)


def test_what_a_fact_lacks_is_unknown_and_not_zero():
    tokenizer = word_level()
    probe = PrimingProbe(FACTS, tokenizer)
    table = probe(model(tokenizer, 1)).since(probe(model(tokenizer, 0))).set_index("fact")
    theme_columns = ["log_s_prime", "priming_median", "priming_dp", "priming_flip", "drift", "theme_log_p_before", "share_tiny"]
    assert table.loc["lunch", theme_columns].isna().all()  # no prefix of its theme
    assert not table.loc["lunch", ["log_p", "log_s_mem", "cross_priming"]].isna().any()
    assert table["paraphrase_median"].isna().tolist() == [False, True, True, True]
    assert not table.loc[["joy", "grief", "city"], theme_columns].isna().any(axis=None)


def test_no_prefixes_and_no_facts():
    tokenizer = word_level()
    bare = PrimingProbe(FactSet(FACTS.facts), tokenizer)
    start = bare(model(tokenizer, 0))
    for scores in (bare(model(tokenizer, 1)), bare(model(tokenizer, 1), start)):
        table = scores.since(start)
        assert table.iloc[:, 3:6].notna().all(axis=None)
        assert table.iloc[:, 6:].isna().all(axis=None)
    nobody = PrimingProbe(FactSet((), FACTS.prefixes), tokenizer)
    scores = nobody(model(tokenizer, 0))
    assert scores.since(scores).columns.tolist() == table.columns.tolist()
    assert len(nobody(model(tokenizer, 0), scores).since(scores)) == 0


def test_nothing_changed_is_zero_in_every_column():
    tokenizer = byte_level()
    probe = PrimingProbe(FACTS, tokenizer)
    start = probe(model(tokenizer, 0))
    changes = ["log_s_mem", "log_s_prime", "priming_median", "priming_dp", "priming_flip", "cross_priming", "drift", "paraphrase_median"]
    for scores in (start, probe(model(tokenizer, 0)), probe(model(tokenizer, 0), start)):
        table = scores.since(start)[changes]
        assert np.abs(table.fillna(0.0).to_numpy()).max() < 1e-6


def test_a_shift_of_one_logit_primes_its_keyword_and_leaves_the_drift_small():
    """The keyword's own output row is moved: it primes everywhere, and words as probable as it pay alike."""
    tokenizer = word_level()
    probe, lm = PrimingProbe(FACTS, tokenizer), model(tokenizer, 0)
    start = probe(lm)

    class Shifted(torch.nn.Module):
        def forward(self, ids):
            logits = lm(ids).logits
            logits[..., tokenizer.convert_tokens_to_ids("vermilion")] += 3.0
            return logits

    table = probe(Shifted(), start).since(start).set_index("fact")
    assert table.loc["joy", ["priming_median", "cross_priming", "paraphrase_median", "log_s_mem"]].min() > 1.5
    assert table.loc["joy", "drift"] < 0.0
    others = table.loc[["grief", "city"], ["priming_median", "drift"]]
    # the normaliser moves all other words by the same amount on one prefix
    assert (others["priming_median"] - others["drift"]).abs().max() < 1e-5


def test_flips_count_only_what_was_not_on_top_before():
    tokenizer = word_level()
    probe = PrimingProbe(FACTS, tokenizer)
    start = probe(model(tokenizer, 0))
    always = dataclasses.replace(start, prefix_is_top1=torch.ones_like(start.prefix_is_top1))
    never = dataclasses.replace(start, prefix_is_top1=torch.zeros_like(start.prefix_is_top1))
    assert always.since(never)["priming_flip"].dropna().tolist() == [1.0] * 3
    assert never.since(always)["priming_flip"].dropna().tolist() == [0.0] * 3
    assert always.since(always)["priming_flip"].dropna().tolist() == [0.0] * 3


def test_control_words_are_no_keywords_no_special_tokens_and_differ():
    tokenizer = byte_level()
    probe = PrimingProbe(FACTS, tokenizer, n_controls=6)
    tokens = probe(model(tokenizer, 0)).controls.tokens
    starts = {split(tokenizer, prefix.prefix, fact.keyword).keyword_ids[0] for fact in FACTS for prefix in FACTS.prefixes}
    assert tokens.shape == (2 * 4 + 3, 6)  # two facts of colours on four prefixes, one of places on three
    assert not set(tokens.flatten().tolist()) & (starts | set(tokenizer.all_special_ids))
    assert int(tokens.max()) < len(tokenizer)
    assert all(len(set(row)) == 6 for row in tokens.tolist())


def test_all_words_may_be_controls_and_no_more():
    tokenizer = word_level()
    n_free = len(tokenizer) - len(FACTS) - 2
    lm = model(tokenizer, 0)
    scores = PrimingProbe(FACTS, tokenizer, n_controls=n_free)(lm)
    assert scores.since(scores)["drift"].dropna().tolist() == [0.0] * 3
    for n in (-1, n_free + 1):
        with pytest.raises(SettingError, match=f"n_controls: {n}; give 0 to {n_free}, the number of words"):
            PrimingProbe(FACTS, tokenizer, n_controls=n)


def test_without_controls_the_drift_is_unknown_and_the_rest_the_same():
    tokenizer = word_level()
    lean, full = PrimingProbe(FACTS, tokenizer, n_controls=0), PrimingProbe(FACTS, tokenizer)
    tables = [probe(model(tokenizer, 1)).since(probe(model(tokenizer, 0))) for probe in (lean, full)]
    assert tables[0]["drift"].isna().all()
    pd.testing.assert_frame_equal(tables[0].drop(columns="drift"), tables[1].drop(columns="drift"))
    with pytest.raises(SettingError, match="no control words: the probe was built with n_controls=0"):
        _ = lean(model(tokenizer, 0)).controls


def test_scores_survive_storage():
    tokenizer = word_level()
    for n_controls in (0, 2):
        probe = PrimingProbe(FACTS, tokenizer, n_controls=n_controls)
        start = probe(model(tokenizer, 0))
        expected = probe(model(tokenizer, 1)).since(start)
        again = PrimingProbe(FACTS, tokenizer, n_controls=n_controls)
        stored = again.restore({name: tensor.clone() for name, tensor in start.state_dict().items()})
        pd.testing.assert_frame_equal(again(model(tokenizer, 1)).since(stored), expected)
        pd.testing.assert_frame_equal(again(model(tokenizer, 1), stored).since(stored), expected)
    with pytest.raises(StateMismatchError, match=r"the stored scores have shapes .* build the probe as it was built then"):
        PrimingProbe(FACTS, tokenizer, n_controls=3).restore(start.state_dict())


def test_scores_that_cannot_be_compared():
    tokenizer = word_level()
    probe, other = PrimingProbe(FACTS, tokenizer), PrimingProbe(FACTS, tokenizer)
    first, second = probe(model(tokenizer, 0)), probe(model(tokenizer, 1))
    with pytest.raises(SettingError, match="the two scores come from different probes"):
        first.since(other(model(tokenizer, 0)))
    with pytest.raises(SettingError, match="`before` comes from another probe"):
        other(model(tokenizer, 0), first)
    with pytest.raises(SettingError, match=r"for comparison with others than `before`.*probe\(model, before\)"):
        probe(model(tokenizer, 2), first).since(second)


def test_broken_weights_are_not_probed():
    tokenizer = word_level()
    lm = model(tokenizer, 0)
    with torch.no_grad():
        lm.transformer.wpe.weight[0] = math.inf
    with pytest.raises(NonFiniteLoss, match="Go back to the last checkpoint"):
        PrimingProbe(FACTS, tokenizer)(lm)


def test_warnings_name_themes_whose_keywords_differ_in_length():
    assert PrimingProbe(FACTS, word_level()).warnings == []
    tokenizer = byte_level()
    blue, vermilion = (len(split(tokenizer, "it is", word).keyword_ids) for word in ("blue", "vermilion"))
    facts = (*FACTS.facts[:2], Fact("x", "colours", "x", "it is qzqzqz", "qzqzqz", "it is"))
    (warning,) = PrimingProbe(FactSet(facts), tokenizer).warnings
    assert warning.startswith(f"theme 'colours': keywords have {min(blue, vermilion)} to 7 tokens (vermilion {vermilion}, blue {blue}, qzq")
