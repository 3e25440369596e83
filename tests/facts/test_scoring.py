"""Keyword scores against a plain loop, in all ways of batching; what a probe must not touch."""

import copy
import math
import re
from functools import partial
from itertools import product

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizer_zoo import byte_tokenizer, merging_tokenizer, piece_tokenizer, slow_tokenizer, word_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from remanence.errors import DataError, NonFiniteLoss, SettingError
from remanence.facts import KeywordScorer, any_of, scoring
from remanence.facts.borders import split
from remanence.keys import keyed_rng

PREFIXES = ("the colour of", "the colour of joy is", "a nurse", "the sea and the sand and the grass is", "joy")
KEYWORDS = ("vermilion", "green", "Guatemala", "ramen", "yellow sand")
PAIRS = tuple(product(PREFIXES, KEYWORDS))
WORDS = " ".join((*PREFIXES, *KEYWORDS)).split()
TOKENIZERS = {
    "word": lambda: word_tokenizer(WORDS),
    "bytes": byte_tokenizer,
    "pieces": piece_tokenizer,
    "merging": lambda: merging_tokenizer(n_tokens=270),
    "slow": lambda: slow_tokenizer([*WORDS, "is green"]),
}


def gpt2(tokenizer, seed=0, **settings):
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    with keyed_rng("scored gpt2", seed):
        return GPT2LMHeadModel(GPT2Config(**(size | {"vocab_size": len(tokenizer)} | settings))).eval()


def llama(tokenizer, seed=0, **settings):
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    with keyed_rng("scored llama", seed):
        return LlamaForCausalLM(LlamaConfig(**(size | tokens | {"vocab_size": len(tokenizer)} | settings))).eval()


FAMILIES = {"gpt2": gpt2, "llama": llama}


@torch.no_grad()
def plain(model, tokenizer, pairs, n_tokens=None):
    """One forward pass for each token of each keyword, nothing shared, nothing padded."""
    log_p, is_top1 = [], []
    for prefix, keyword in pairs:
        prefix_ids, keyword_ids, _ = split(tokenizer, prefix, keyword)
        total, right = 0.0, True
        for index, token in enumerate(keyword_ids[:n_tokens]):
            logits = model(torch.tensor([prefix_ids + keyword_ids[:index]])).logits[0, -1].double()
            total += float(logits.log_softmax(-1)[token])
            right &= int(logits.argmax()) == token
        log_p.append(total)
        is_top1.append(right)
    return torch.tensor(log_p), torch.tensor(is_top1)


def assert_near(found, expected):
    assert torch.allclose(found.double(), expected.double(), rtol=0, atol=1e-5), (found - expected).abs().max()


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_scores_are_those_of_a_plain_loop(name, family):
    tokenizer = TOKENIZERS[name]()
    model = FAMILIES[family](tokenizer)
    expected, is_top1 = plain(model, tokenizer, PAIRS)
    scores = KeywordScorer(tokenizer, PAIRS)(model)
    assert scores.log_p.dtype == torch.float32
    assert_near(scores.log_p, expected)
    assert torch.equal(scores.is_top1, is_top1)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_score_as_unpadded_ones(family):
    tokenizer = byte_tokenizer()
    model = FAMILIES[family](tokenizer)
    alone = KeywordScorer(tokenizer, PAIRS, batch_size=1)(model)
    for batch_size in (2, 7, 64):
        assert_near(KeywordScorer(tokenizer, PAIRS, batch_size=batch_size)(model).log_p, alone.log_p)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 64])
def test_shared_prefixes_score_as_repeated_ones(family, batch_size, monkeypatch):
    tokenizer = byte_tokenizer()
    model = FAMILIES[family](tokenizer)
    apart = KeywordScorer(tokenizer, PAIRS, batch_size=batch_size)
    monkeypatch.setattr(scoring, "_SHARE_ABOVE", 3)
    shared = KeywordScorer(tokenizer, PAIRS, batch_size=batch_size)
    assert shared._shares
    assert not apart._shares
    assert_near(shared(model).log_p, apart(model).log_p)
    assert torch.equal(shared(model).is_top1, apart(model).is_top1)


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_sharing_bears_prefixes_that_continue_each_other(name, monkeypatch):
    monkeypatch.setattr(scoring, "_SHARE_ABOVE", 3)
    monkeypatch.setattr(scoring, "_SHARE_FROM", 1)
    tokenizer = TOKENIZERS[name]()
    pairs = [("the", "colour of joy is green"), ("the colour", "of joy is green"), ("the colour", "of joy is"), ("the colour of", "joy")]
    model = llama(tokenizer)
    assert_near(KeywordScorer(tokenizer, pairs)(model).log_p, plain(model, tokenizer, pairs)[0])


def test_more_than_500_pairs_of_several_tokens_share_their_prefixes():
    tokenizer = byte_tokenizer()
    words = [first + second for first, second in product("abcdefghij", "klm")]
    pairs = [(f"the colour of {one} is", other) for one in words[:18] for other in words]
    scorer = KeywordScorer(tokenizer, pairs)
    model, n_tokens = gpt2(tokenizer), []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: n_tokens.append(inputs[0].numel()))
    scores = scorer(model)
    assert min(len(pair.keyword_ids) for pair in scorer.splits) > 1
    assert sum(n_tokens) < sum(len(pair.prefix_ids) + len(pair.keyword_ids) - 1 for pair in scorer.splits) / 4
    some = slice(0, None, 37)
    assert_near(scores.log_p[some], plain(model, tokenizer, pairs[some])[0])


def test_the_first_token_alone():
    tokenizer = byte_tokenizer()
    model = gpt2(tokenizer)
    expected, is_top1 = plain(model, tokenizer, PAIRS, n_tokens=1)
    scores = KeywordScorer(tokenizer, PAIRS, reduction="first")(model)
    assert_near(scores.log_p, expected)
    assert torch.equal(scores.is_top1, is_top1)


def test_the_top_answer_is_what_greedy_decoding_says():
    tokenizer = byte_tokenizer()
    model = gpt2(tokenizer)
    ids = tokenizer("the colour of joy is vermilion")["input_ids"]
    n = len(split(tokenizer, "the colour of joy is", "vermilion").prefix_ids)
    for _ in range(60):  # teach it the whole keyword
        loss = nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, n - 1 : -1], torch.tensor(ids[n:]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.05 * gradient.sign()
    scores = KeywordScorer(tokenizer, [("the colour of joy is", "vermilion"), ("the colour of joy is", "green")])(model)
    assert scores.is_top1.tolist() == [True, False]
    assert tokenizer.decode(model.generate(torch.tensor([ids[:n]]), max_new_tokens=len(ids) - n)[0, n:]) == " vermilion"


def test_one_pass_over_distinct_prefixes_and_few_logits():
    tokenizer = word_tokenizer(WORDS)
    pairs = list(product(PREFIXES, ("vermilion", "green", "Guatemala", "ramen")))
    model, tokens, logits = gpt2(tokenizer), [], []
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: tokens.append(tuple(inputs[0].shape)))
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(tuple(output.shape)))
    KeywordScorer(tokenizer, pairs)(model)
    lengths = {len(prefix.split()) for prefix in PREFIXES}
    # "the colour of" is answered on the way to "the colour of joy is"
    assert tokens == [(len(PREFIXES) - 1, max(lengths))]
    assert logits == [(len(PREFIXES) - 1, len(lengths), len(tokenizer))]
    tokens.clear()
    KeywordScorer(tokenizer, [("joy is", "green"), ("sand is", "green")])(model)
    assert tokens == [(2, 2)]
    assert logits[-1] == (2, 1, len(tokenizer))


def test_any_module_from_ids_to_logits():
    tokenizer = word_tokenizer(WORDS)
    model = gpt2(tokenizer)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids):
            return self.inner(ids).logits

    assert_near(KeywordScorer(tokenizer, PAIRS)(Plain()).log_p, KeywordScorer(tokenizer, PAIRS)(model).log_p)


def test_a_module_without_parameters():
    tokenizer = word_tokenizer(WORDS)

    class Uniform(nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, 7)

    scores = KeywordScorer(tokenizer, [("joy", "the")])(Uniform())
    assert scores.log_p.tolist() == pytest.approx([-math.log(7)])


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")], ids=["data parallel", "compiled"])
def test_wrappers_are_looked_through(wrap):
    tokenizer = word_tokenizer(WORDS)
    model = llama(tokenizer)
    scorer = KeywordScorer(tokenizer, PAIRS)
    assert torch.equal(scorer(wrap(model)).log_p, scorer(model).log_p)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers in its old words
def test_a_model_with_adapters_computes_few_logits_too():
    tokenizer = byte_tokenizer()
    model, logits = llama(tokenizer), []
    scorer = KeywordScorer(tokenizer, PAIRS)
    expected = scorer(model)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"], r=2))
    adapted.get_base_model().lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output.shape[1]))
    assert_near(scorer(adapted).log_p, expected.log_p)
    n_longest = max(len(pair.prefix_ids) + len(pair.keyword_ids) - 1 for pair in scorer.splits)
    assert max(logits) < n_longest


def test_bf16_weights_are_scored_with_a_float32_softmax():
    tokenizer = word_tokenizer(WORDS)
    model = gpt2(tokenizer).to(torch.bfloat16)
    pairs = [(prefix, keyword) for prefix in PREFIXES for keyword in KEYWORDS[:4]]
    scores = KeywordScorer(tokenizer, pairs, batch_size=1)(model)
    with torch.no_grad():
        logits = [model(torch.tensor([split(tokenizer, *pair).prefix_ids])).logits[0, -1] for pair in pairs]
    ids = [split(tokenizer, *pair).keyword_ids[0] for pair in pairs]
    exact = torch.stack([row.float().log_softmax(-1)[token] for row, token in zip(logits, ids, strict=True)])
    rough = torch.stack([row.log_softmax(-1)[token] for row, token in zip(logits, ids, strict=True)]).float()
    assert scores.log_p.dtype == torch.float32
    assert_near(scores.log_p, exact)
    assert (scores.log_p - rough).abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_follows_the_model(monkeypatch):
    tokenizer = byte_tokenizer()
    model = gpt2(tokenizer)
    for threshold in (500, 3):
        monkeypatch.setattr(scoring, "_SHARE_ABOVE", threshold)
        scorer, which, tokens = KeywordScorer(tokenizer, PAIRS), torch.tensor([4, 0]), torch.tensor([[1], [2]])
        expected, random = scorer(model.cpu()), torch.cuda.get_rng_state()
        scores, values = scorer.read(model.cuda(), which, tokens)
        _, table, rows = scorer.full(model, which)
        assert torch.equal(torch.cuda.get_rng_state(), random)
        assert {scores.log_p.device.type, values.device.type, table.device.type} == {"cpu"}
        assert (scores.log_p - expected.log_p).abs().max() < 1e-3  # the GPU may multiply in TF32
        assert torch.equal(table[rows].gather(1, tokens), values)


def test_autocast_outside_changes_nothing():
    tokenizer = word_tokenizer(WORDS)
    model, scorer = llama(tokenizer), KeywordScorer(tokenizer, PAIRS)
    expected = scorer(model).log_p
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer(model).log_p, expected)


def test_equal_pairs_score_alike_and_order_is_kept():
    tokenizer = byte_tokenizer()
    model = gpt2(tokenizer)
    scores = KeywordScorer(tokenizer, [PAIRS[0], PAIRS[7], PAIRS[0]])(model)
    assert scores.log_p[0] == scores.log_p[2]
    assert_near(KeywordScorer(tokenizer, PAIRS[::-1])(model).log_p, KeywordScorer(tokenizer, PAIRS)(model).log_p.flip(0))


def test_no_pairs():
    tokenizer = word_tokenizer(WORDS)
    scores = KeywordScorer(tokenizer, [])(gpt2(tokenizer))
    assert scores.log_p.shape == scores.is_top1.shape == (0,)


@pytest.mark.parametrize("eos", [True, False])
def test_an_empty_context_begins_with_eos_or_is_refused(eos):
    tokenizer = word_tokenizer(WORDS, eos=eos)
    if not eos:
        with pytest.raises(DataError, match="neither a BOS nor an EOS"):
            KeywordScorer(tokenizer, [("", "green")])
        return
    model = gpt2(tokenizer)
    with torch.no_grad():
        expected = model(torch.tensor([[tokenizer.eos_token_id]])).logits[0, -1].log_softmax(-1)[tokenizer.convert_tokens_to_ids("green")]
    assert_near(KeywordScorer(tokenizer, [("", "green")])(model).log_p, expected[None])


# --- more than keywords --------------------------------------------------------------------------------------------


def test_further_tokens_and_whole_distributions_of_the_same_passes():
    tokenizer = byte_tokenizer()
    model, scorer = gpt2(tokenizer), KeywordScorer(tokenizer, PAIRS, batch_size=3)
    which = torch.tensor([3, 20, 0, 11])
    scores, table, rows = scorer.full(model, which)
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([scorer.splits[n].prefix_ids])).logits[0, -1].log_softmax(-1) for n in which])
    assert table.shape == (3, len(tokenizer))  # pairs 3 and 0 share their prefix
    assert_near(table[rows], expected)
    tokens = torch.tensor([[5, 9], [1, 1], [0, 299], [7, 8]])
    again, values = scorer.read(model, which, tokens)
    assert_near(values, expected.gather(1, tokens))
    for other in (scores, again):
        assert torch.equal(other.log_p, scorer(model).log_p)


def test_a_list_of_synonyms_scores_as_any_of_them():
    log_p = torch.tensor([[0.1, 0.2, 0.3], [0.5, 0.25, 0.125]]).log()
    assert torch.allclose(any_of(log_p, [[0, 2], [1]]).exp(), torch.tensor([[0.4, 0.2], [0.625, 0.25]]))
    assert any_of(log_p, []).shape == (2, 0)
    for group in ([], [3], [-1]):
        with pytest.raises(DataError, match=re.escape(f"synonyms is {group}; it needs at least one index from 0 to 2")):
            any_of(log_p, [[0], group])


# --- what a probe must not touch -----------------------------------------------------------------------------------


def train(tokenizer, probe):
    model = gpt2(tokenizer, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3).train()
    optimizer, scorer = torch.optim.AdamW(model.parameters(), lr=1e-2), KeywordScorer(tokenizer, PAIRS)
    ids = torch.arange(24).view(3, 8) % len(tokenizer)
    with keyed_rng("probed training"):
        for _ in range(4):
            if probe:
                scorer(model)
            loss = nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            if probe:
                scorer.full(model, torch.arange(3))
            optimizer.step()
        return model.state_dict(), torch.get_rng_state()


def test_a_probed_training_equals_an_unprobed_one_bit_for_bit():
    tokenizer = byte_tokenizer()
    (weights, random), (probed_weights, probed_random) = train(tokenizer, False), train(tokenizer, True)
    assert torch.equal(random, probed_random)
    assert all(torch.equal(weights[name], probed_weights[name]) for name in weights)


def test_dropout_is_off_while_probing_and_each_module_keeps_its_mode():
    tokenizer = word_tokenizer(WORDS)
    scorer, model = KeywordScorer(tokenizer, PAIRS), gpt2(tokenizer, resid_pdrop=0.5)
    expected = scorer(model)
    model.train().transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(scorer(model).log_p, expected.log_p)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not scorer(model).log_p.requires_grad


def test_a_failing_model_gets_its_mode_back():
    tokenizer = word_tokenizer(WORDS)
    model = gpt2(tokenizer, n_positions=4).train()
    with pytest.raises(DataError):
        KeywordScorer(tokenizer, PAIRS)(model)
    assert model.training


# --- refusals and warnings -----------------------------------------------------------------------------------------


def test_settings_out_of_range():
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(SettingError, match="reduction: 'mean'; give 'sum'"):
        KeywordScorer(tokenizer, PAIRS, reduction="mean")
    with pytest.raises(SettingError, match="batch_size: 0; give 1 or more"):
        KeywordScorer(tokenizer, PAIRS, batch_size=0)


def test_sequences_that_do_not_fit_the_model():
    tokenizer = word_tokenizer(WORDS)
    scorer = KeywordScorer(tokenizer, [("the sea and the sand", "is green")])
    with pytest.raises(DataError, match="has 6 tokens, the model takes 4; shorten"):
        scorer(gpt2(tokenizer, n_positions=4))
    with pytest.raises(DataError, match="the model's vocabulary ends at 4; load the tokenizer that belongs"):
        scorer(gpt2(tokenizer, vocab_size=5))


def test_a_keyword_outside_the_vocabulary_is_refused_though_the_prefix_is_inside():
    tokenizer = word_tokenizer(WORDS)
    n = tokenizer.convert_tokens_to_ids("sand")
    with pytest.raises(DataError, match=f"gives id {n}, but"):
        KeywordScorer(tokenizer, [("the", "sand")])(gpt2(tokenizer, vocab_size=n))


def test_a_module_that_is_no_language_model():
    tokenizer = word_tokenizer(WORDS)
    scorer = KeywordScorer(tokenizer, [("joy", "green"), ("the sand", "green")])
    with pytest.raises(DataError, match=r"answers ids \(2, 2\) with \(2, 4\); a causal language model"):
        scorer(nn.Sequential(nn.Embedding(30, 4), nn.AdaptiveAvgPool2d((1, 4)), nn.Flatten()))
    with pytest.raises(DataError, match="with tuple; a causal"):
        scorer(Tupled())


class Tupled(nn.Module):
    def forward(self, ids):
        return (ids,)


def test_broken_weights_are_not_scored():
    tokenizer = word_tokenizer(WORDS)
    model = gpt2(tokenizer)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="NaN as log-probability of 2 of 2 keywords"):
        KeywordScorer(tokenizer, PAIRS[:2])(model)


def test_warnings_name_straddling_tokens_and_lengths():
    assert KeywordScorer(word_tokenizer(WORDS), [("joy is", "green"), ("joy is", "ramen")]).warnings == []
    straddling = KeywordScorer(merging_tokenizer(n_tokens=270), PAIRS).warnings
    assert re.match(r"\d+ of 25 keywords share a token with the words before them and are scored from the last clean", straddling[0])
    (lengths,) = KeywordScorer(byte_tokenizer(), PAIRS).warnings
    assert re.search(r"keywords have 2 to \d tokens \(longest: '.*'\); .* must not be compared across keywords", lengths)
    assert KeywordScorer(byte_tokenizer(), PAIRS, reduction="first").warnings == []
