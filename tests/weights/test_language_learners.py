"""Language learners: the contract, and what forget does to the weights."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from remanence.erasure import sparse_delta, sparse_mask
from remanence.errors import DataError, ErasureNotSupported, SettingError
from remanence.keys import generator, keyed_rng
from remanence.learner import fit
from remanence.state import all_finite, copy_state, state_bytes
from remanence.task import Data, Task
from remanence.testing import check_learner, state_difference
from remanence.weights import LanguageFineTuning, LanguageLoRA

V, T = 13, 5


def gpt2(seed=0, **settings):
    size = {"vocab_size": V, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    with keyed_rng("gpt2 of a learner", seed):
        return GPT2LMHeadModel(GPT2Config(**(size | settings)))


def llama(seed=0):
    size = {"vocab_size": V, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with keyed_rng("llama of a learner", seed):
        return LlamaForCausalLM(LlamaConfig(**size, bos_token_id=0, eos_token_id=0))


class Bigram(torch.nn.Module):
    """The least that is a language model."""

    def __init__(self):
        super().__init__()
        self.words, self.answer = torch.nn.Embedding(V, 4), torch.nn.Linear(4, V)

    def forward(self, ids):
        return self.answer(self.words(ids))


def text(name, first_id, n=6, n_test=4, ordered=False):
    ids = torch.randint(V, (n + n_test, T + 1), generator=generator("text", name))
    targets = ids[:, 1:].clone()
    targets[:, 0] = -100
    numbers = torch.arange(first_id, first_id + n + n_test)
    train = Data(ids[:n, :-1].clone(), targets[:n], numbers[:n], ordered=ordered)
    return Task(name, train, Data(ids[n:, :-1].clone(), targets[n:], numbers[n:]), answer="tokens")


FIRST, SECOND = text("first", 0), text("second", 100, ordered=True)
KINDS = {
    "fine-tuning": lambda seed=0, **more: LanguageFineTuning(gpt2(), batch_size=2, lr=1e-2, seed=seed, **more),
    "fine-tuning llama": lambda seed=0, **more: LanguageFineTuning(llama(), batch_size=2, lr=1e-2, seed=seed, **more),
    "LoRA": lambda seed=0, **more: LanguageLoRA(gpt2(), batch_size=2, lr=1e-2, rank=2, seed=seed, **more),
    "LoRA llama": lambda seed=0, **more: LanguageLoRA(llama(), batch_size=2, lr=1e-2, rank=2, seed=seed, **more),
}


@pytest.mark.parametrize("kind", KINDS)
def test_language_learner_keeps_the_contract(kind):
    check_learner(KINDS[kind], [FIRST, SECOND])


def weights(learner):
    return copy_state(learner.state_dict()["weights"])


@pytest.mark.parametrize(("select", "fraction"), [("ignore_top", 0.08), ("ignore_top", 1.0), ("keep_top", 0.3)])
def test_forgetting_at_once_is_the_sparse_delta_of_the_window_bit_for_bit(select, fraction):
    learner = KINDS["fine-tuning"](select=select, fraction=fraction)
    fit(learner, FIRST)
    before = weights(learner)
    fit(learner, SECOND)
    wanted = sparse_delta(before, weights(learner), select, fraction)
    fit(learner, SECOND, "forget")
    assert state_difference(weights(learner), wanted) == ""
    if fraction == 1.0:
        assert state_difference(weights(learner), before) == ""


def test_forgetting_later_takes_out_the_same_change():
    learner = KINDS["fine-tuning"]()
    before = weights(learner)
    fit(learner, FIRST)
    after = weights(learner)
    erased = sparse_delta(before, after)
    fit(learner, SECOND)
    now = weights(learner)
    fit(learner, FIRST, "forget")
    found = weights(learner)
    for name, value in found.items():
        assert torch.allclose(value, now[name] - (after[name] - erased[name]), atol=1e-7)
    assert any(not torch.equal(found[name], now[name]) for name in found)


def test_a_task_learned_twice_goes_out_whole():
    learner = KINDS["fine-tuning"](fraction=1.0)
    before = weights(learner)
    fit(learner, FIRST)
    fit(learner, FIRST)
    assert len(learner.state_dict()["windows"]["first"]) == 2
    fit(learner, FIRST, "forget")
    assert state_difference(weights(learner), before) == ""
    assert learner.footprint().task_bytes == {}


def test_the_optimizer_of_fine_tuning_runs_on_through_the_tasks():
    learner = KINDS["fine-tuning"]()
    fit(learner, FIRST)
    fit(learner, SECOND)
    assert {int(entry["step"]) for entry in learner.state_dict()["moments"]} == {6}


@pytest.mark.parametrize("kind", ["LoRA", "LoRA llama"])
def test_forgetting_an_adapter_subtracts_the_masked_product(kind):
    learner = KINDS[kind](fraction=0.25)
    before = weights(learner)
    fit(learner, FIRST)
    after = weights(learner)
    moved = {name: after[name] - before[name] for name in after if not torch.equal(after[name], before[name])}
    assert {name.rsplit(".", 2)[1] for name in moved} == set(learner.modules)
    fit(learner, FIRST, "forget")
    for name, value in weights(learner).items():
        kept = sparse_mask(moved[name], fraction=0.25) if name in moved else torch.ones_like(value, dtype=torch.bool)
        wanted = torch.where(kept, after[name], before[name])
        # the mask is that of the product, which a sum with the weights rounds: an entry at the border may fall on the other side
        assert (value - wanted).abs().gt(1e-6).sum() <= 2


def test_an_adapter_that_goes_out_whole_leaves_the_weights_as_they_were():
    learner = KINDS["LoRA"](fraction=1.0)
    before = weights(learner)
    fit(learner, FIRST)
    fit(learner, FIRST, "forget")
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in weights(learner).items())


def test_windows_are_counted_by_task_and_an_adapter_keeps_little():
    sizes = {}
    for kind in ("fine-tuning", "LoRA"):
        learner = KINDS[kind]()
        fit(learner, FIRST)
        sizes[kind] = learner.footprint().task_bytes["first"]
        assert sizes[kind] == state_bytes(learner.state_dict()["windows"]["first"])
    whole = state_bytes(KINDS["fine-tuning"]().state_dict()["weights"])
    assert sizes["fine-tuning"] == 2 * whole
    assert sizes["LoRA"] < whole / 4
    assert KINDS["LoRA"]().footprint().trainable_parameters == 2 * (8 + 24)


@pytest.mark.parametrize("kind", KINDS)
def test_score_sums_the_counted_targets_and_is_never_dense(kind, monkeypatch):
    learner = KINDS[kind]()
    inputs, targets = FIRST.test.inputs, FIRST.test.targets
    log_p = learner.predict(inputs).logits.log_softmax(-1)
    wanted = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0][:, 1:].sum(-1)
    rows, ask = [], learner._logits
    monkeypatch.setattr(learner, "_logits", lambda part: rows.append(len(part)) or ask(part))
    assert torch.allclose(learner.score(inputs, targets), wanted, atol=1e-5)
    assert rows == [2, 2]
    assert learner.score(inputs[:0], targets[:0]).shape == (0,)
    assert math.isinf(float(learner.score(inputs[:1], torch.full((1, T), V))[0]))


def test_any_module_from_ids_to_logits_is_learned():
    for learner in (LanguageFineTuning(Bigram(), lr=0.1), LanguageLoRA(Bigram(), lr=0.1, modules=("answer",))):
        before = learner.score(FIRST.train.inputs, FIRST.train.targets).sum()
        for _ in range(5):
            fit(learner, FIRST)
        assert learner.score(FIRST.train.inputs, FIRST.train.targets).sum() > before
        assert all_finite(learner.state_dict())


def test_a_folder_is_read_and_a_model_is_copied(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path)
    learner = LanguageFineTuning(tmp_path)
    assert torch.equal(learner.predict(FIRST.test.inputs).logits, LanguageFineTuning(model).predict(FIRST.test.inputs).logits)
    fit(LanguageFineTuning(model, lr=0.1), FIRST)
    assert torch.equal(model.transformer.wte.weight, gpt2().transformer.wte.weight)
    learner.export().save_pretrained(tmp_path / "again")


def test_an_adapter_in_training_is_merged_in_what_is_exported():
    learner = KINDS["LoRA"]()
    steps = learner.learn(FIRST)
    next(steps)
    next(steps)
    exported = learner.export()
    assert not [name for name, _ in exported.named_parameters() if "lora" in name]
    with torch.no_grad():
        logits = exported(FIRST.test.inputs).logits
    assert torch.allclose(logits, learner.predict(FIRST.test.inputs).logits, atol=1e-5)
    assert next(steps).step == 3


def test_wrong_settings_are_refused():
    for name in ("epochs", "batch_size", "lr"):
        with pytest.raises(SettingError, match=f"LanguageFineTuning: {name}=0 must be above 0"):
            LanguageFineTuning(Bigram(), **{name: 0})
    for name in ("rank", "alpha"):
        with pytest.raises(SettingError, match=f"LanguageLoRA: {name}=0 must be above 0"):
            LanguageLoRA(Bigram(), **{name: 0})
    with pytest.raises(SettingError, match="fraction=2 lies outside"):
        LanguageFineTuning(Bigram(), fraction=2)
    with pytest.raises(SettingError, match="select='top' is no selection"):
        LanguageFineTuning(Bigram(), select="top")
    with pytest.raises(SettingError, match=r"peft has no choice of modules for 'Bigram'; give some of \['answer'\]"):
        LanguageLoRA(Bigram())
    with pytest.raises(SettingError, match=r"modules \['query'\] match no linear layer of the model; there are \['answer'\]"):
        LanguageLoRA(Bigram(), modules=("query",))
    quantised = gpt2()
    quantised.is_quantized = True
    with pytest.raises(SettingError, match="weights are quantised"):
        LanguageFineTuning(quantised)


def test_what_is_no_text_of_this_model_is_refused():
    learner = KINDS["fine-tuning"]()
    floats = Data(torch.zeros(2, T), torch.zeros(2, T, dtype=torch.int64), torch.arange(2))
    with pytest.raises(DataError, match="takes windows of ids"):
        learner.learn(Task("floats", floats, FIRST.test, answer="tokens"))
    strange = Data(torch.full((2, T), V), torch.zeros(2, T, dtype=torch.int64), torch.arange(50, 52))
    with pytest.raises(DataError, match=f"has ids {V} to {V}, the model knows 0 to {V - 1}"):
        learner.learn(Task("strange", strange, FIRST.test, answer="tokens"))


def test_without_a_window_nothing_is_forgotten():
    learner = KINDS["fine-tuning"]()
    fit(learner, FIRST)
    with pytest.raises(ErasureNotSupported, match=r"keeps no window of 'second'.*Kept: first"):
        fit(learner, SECOND, "forget")
    with pytest.raises(ErasureNotSupported, match=r"learned \[6\] windows of text as 'first' and is asked to forget 2"):
        fit(learner, FIRST.select(torch.tensor([0, 1])), "forget")
    fit(learner, FIRST, "forget")
    with pytest.raises(ErasureNotSupported, match=r"forgotten already. Kept: none"):
        fit(learner, FIRST, "forget")
