"""Gradient erasers: they reach the target and stand there, keep what is retained, and refuse what cannot work."""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from erased_world import FACTS, FORGET, PREFIXES, SENTENCES, World, untrained, windows_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from remanence.erasure import CleanFineTuning, GradientAscent, GradientDifference, erase, finish, median_log_p, uniform_log_p
from remanence.erasure.rows import keyword_rows, overlap, text_rows
from remanence.errors import DataError, NonFiniteLoss, SettingError
from remanence.facts import Fact, FactSet
from remanence.keys import keyed_rng
from remanence.learner import STOP
from remanence.parts.language_model import held_out_loss
from remanence.state import copy_state, states_equal

ASCENT, DIFFERENCE = GradientAscent(), GradientDifference()


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def target(world):
    return median_log_p(world.base, FORGET, world.tokenizer)


@pytest.fixture
def tuned(world):
    return deepcopy(world.tuned)


def run(world, model, method=ASCENT, facts=FORGET, **settings):
    defaults = {"retain": world.retain, "target_log_p": -8.0, "lr": 1e-3, "seed": 0}
    return finish(erase(model, facts, world.tokenizer, method, **(defaults | settings)))


# --- claims --------------------------------------------------------------------------------------------------------


def test_the_facts_are_known_before(world, target):
    assert median_log_p(world.tuned, FORGET, world.tokenizer) > -1
    assert target < -9


@pytest.mark.parametrize("method", [ASCENT, DIFFERENCE])
def test_an_eraser_stands_at_the_target_and_not_beyond(world, tuned, target, method):
    outcome = run(world, tuned, method, target_log_p=target)
    assert outcome.reason == "target reached"
    assert target - 0.1 <= outcome.log_p <= target
    assert median_log_p(tuned, FORGET, world.tokenizer) == outcome.log_p
    assert 0 < outcome.steps < 100
    assert outcome.seconds > 0


def test_a_step_that_goes_far_beyond_is_taken_back_to_the_target(world, tuned):
    outcome = run(world, tuned, lr=0.05, target_log_p=-6.0)
    assert outcome.steps <= 2  # plain ascent at this rate falls by tens of nats in a step
    assert -6.1 <= outcome.log_p <= -6.0


def test_retaining_spares_the_held_out_text_at_equal_forgetting(world, target):
    losses = {}
    for method in (ASCENT, DIFFERENCE):
        model = deepcopy(world.tuned)
        run(world, model, method, target_log_p=target)
        losses[method.name] = held_out_loss(model, world.held_out)
    assert losses["gradient difference"] < losses["gradient ascent"] - 0.1


def test_clean_text_lets_facts_fade_slowly_and_harms_nothing(world, tuned, target):
    before = held_out_loss(tuned, world.held_out)
    outcome = run(world, tuned, CleanFineTuning(), target_log_p=target, steps=40)
    assert outcome.reason == "steps used up"
    assert target + 5 < outcome.log_p < -1
    assert held_out_loss(tuned, world.held_out) < before


def test_the_floor_brings_back_the_last_state_above_it(world, tuned):
    before = held_out_loss(tuned, world.held_out)
    outcome = run(world, tuned, target_log_p=-40.0, utility_floor=0.02, held_out=world.held_out)
    assert outcome.reason == "utility floor"
    assert before < held_out_loss(tuned, world.held_out) <= 1.02 * before
    assert outcome.log_p == median_log_p(tuned, FORGET, world.tokenizer)
    assert "raised the held-out loss by" in outcome.notes[0]
    assert "the floor allows 2.00%" in outcome.notes[0]


def test_the_floor_holds_at_the_target_too(world, tuned):
    before = held_out_loss(tuned, world.held_out)
    outcome = run(world, tuned, lr=0.05, target_log_p=-6.0, utility_floor=0.001, held_out=world.held_out)
    assert outcome.reason == "utility floor"
    assert held_out_loss(tuned, world.held_out) == before


def test_a_floor_on_the_retained_rows_is_said_to_be_one(world, tuned):
    outcome = run(world, tuned, DIFFERENCE, utility_floor=0.5)
    assert any("measured on the retained rows" in note for note in outcome.notes)


# --- the loop ------------------------------------------------------------------------------------------------------


def test_a_model_at_the_target_is_not_touched(world, tuned):
    before = copy_state(tuned.state_dict())
    steps = erase(tuned, FORGET, world.tokenizer, ASCENT, target_log_p=0.0)
    assert list(steps) == []
    outcome = finish(erase(tuned, FORGET, world.tokenizer, ASCENT, target_log_p=0.0))
    assert (outcome.reason, outcome.steps) == ("already at the target", 0)
    assert "nothing was done: the facts stand at" in outcome.notes[0]
    assert states_equal(before, copy_state(tuned.state_dict()))


def test_the_caller_sees_each_step(world, tuned):
    seen = list(erase(tuned, FORGET, world.tokenizer, DIFFERENCE, world.retain, -40.0, steps=3, batch_size=2, lr=1e-4))
    assert [progress.step for progress in seen] == [1, 2, 3]
    assert {progress.steps for progress in seen} == {3}
    assert {progress.n_examples for progress in seen} == {4}
    assert all(torch.isfinite(progress.loss) for progress in seen)


def test_stop_ends_it_with_an_outcome(world, tuned):
    steps = erase(tuned, FORGET, world.tokenizer, ASCENT, target_log_p=-40.0, lr=1e-3)
    next(steps)
    with pytest.raises(StopIteration) as end:
        steps.send(STOP)
    assert (end.value.value.reason, end.value.value.steps) == ("stopped by the caller", 1)
    assert end.value.value.log_p == median_log_p(tuned, FORGET, world.tokenizer)


def test_equal_seeds_give_equal_weights_and_the_global_random_state_stays(world):
    with keyed_rng("dropout"):
        models = [deepcopy(world.tuned).train() for _ in range(2)]
    for model in models:
        model.transformer.drop.p = 0.5
    before = torch.get_rng_state()
    for model in models:
        run(world, model, DIFFERENCE, steps=5, batch_size=1, target_log_p=-40.0)
    assert torch.equal(before, torch.get_rng_state())
    assert states_equal(*(copy_state(model.state_dict()) for model in models))
    assert all(module.training for module in models[0].modules())
    assert all(weight.grad is None for weight in models[0].parameters())
    other = deepcopy(world.tuned)
    run(world, other, DIFFERENCE, steps=5, batch_size=1, target_log_p=-40.0, seed=1)
    assert not states_equal(copy_state(other.state_dict()), copy_state(models[0].state_dict()))


def test_rare_looks_land_at_the_target_too(world, tuned):
    outcome = run(world, tuned, check_every=7)
    assert outcome.steps % 7 == 0
    assert -8.1 <= outcome.log_p <= -8.0


def test_the_method_and_all_settings_are_on_record(world, tuned):
    method = run(world, tuned, GradientDifference(alpha=2.0), steps=2, target_log_p=-40.0, utility_floor=3.0).method
    assert method == {
        "name": "gradient difference",
        "alpha": 2.0,
        "optimizer": "AdamW, no weight decay",
        "lr": 1e-3,
        "gradient_norm_clip": 1.0,
        "batch_size": 8,
        "max_steps": 2,
        "target_log_p": -40.0,
        "utility_floor": 3.0,
        "check_every": 1,
    }


def test_without_a_target_a_uniform_guess_stands_in(world, tuned):
    outcome = run(world, tuned, target_log_p=None)
    assert outcome.target_log_p == uniform_log_p(tuned) == pytest.approx(-3.970, abs=1e-3)  # log 53
    assert "stands in for it" in outcome.notes[0]


def test_facts_can_be_what_is_retained(world, tuned):
    known = FactSet((Fact("sand", "colours", "known", "the colour of sand is black .", "black", "the colour of sand is"),))
    before = median_log_p(tuned, known, world.tokenizer)
    outcome = run(world, tuned, GradientDifference(), retain=known)
    alone = deepcopy(world.tuned)
    run(world, alone)
    assert outcome.reason == "target reached"
    assert median_log_p(tuned, known, world.tokenizer) > before - 0.1
    assert median_log_p(alone, known, world.tokenizer) < median_log_p(tuned, known, world.tokenizer)


# --- what goes wrong -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poison:
    """A user's own eraser whose loss is not a number."""

    name = "poison"
    needs_retain = False

    def loss(self, forget, retain):
        return forget() * float("nan")


def test_a_loss_that_is_no_number_moves_nothing(world, tuned):
    before = copy_state(tuned.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"step 1 of poison: the loss is nan .* every fact of that batch has a finite loss") as error:
        run(world, tuned, Poison())
    assert "lower lr=0.001" in str(error.value)
    assert states_equal(before, copy_state(tuned.state_dict()))


def test_weights_that_break_are_found_at_the_next_look_and_put_back(world, tuned):
    before = copy_state(tuned.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"log-probability of nan; facts of that batch without a finite loss: joy, ann"):
        run(world, tuned, lr=1e30)
    assert states_equal(before, copy_state(tuned.state_dict()))


def test_weights_that_break_between_looks_name_step_and_fact(world, tuned):
    before = copy_state(tuned.state_dict())
    with pytest.raises(NonFiniteLoss, match=r"step 2 of gradient ascent: the loss is nan .* without a finite loss: (joy|ann)\."):
        run(world, tuned, lr=1e30, batch_size=1, check_every=10)
    assert states_equal(before, copy_state(tuned.state_dict()))
    assert all(weight.grad is None for weight in tuned.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0 must be above 0"),
        ({"batch_size": -1}, "batch_size=-1 must be above 0"),
        ({"lr": 0.0}, r"lr=0\.0 must be above 0"),
        ({"check_every": 0}, "check_every=0 must be above 0"),
        ({"utility_floor": 0.0}, r"utility_floor=0\.0 must be above 0"),
        ({"retain": None, "utility_floor": 0.1}, "needs text to measure the loss on; give held_out or retain"),
        ({"retain": None, "method": GradientDifference()}, "gradient difference trains on what must stay known; give retain"),
        ({"retain": None, "method": CleanFineTuning()}, "clean fine-tuning trains on what must stay known; give retain"),
    ],
)
def test_settings_that_cannot_work(world, tuned, settings, message):
    with pytest.raises(SettingError, match=message):
        run(world, tuned, **settings)


def test_a_weight_of_nothing():
    with pytest.raises(SettingError, match="alpha=0 must be above 0; for ascent alone there is GradientAscent"):
        GradientDifference(alpha=0)


def test_models_that_cannot_be_trained(world, tuned):
    with pytest.raises(SettingError, match="no parameter of the model requires a gradient"):
        run(world, deepcopy(tuned).requires_grad_(False))
    tuned.is_quantized = True
    with pytest.raises(SettingError, match="the model is quantised: a gradient step on rounded weights"):
        run(world, tuned)


def test_no_facts_and_no_vocabulary(world, tuned):
    with pytest.raises(DataError, match="there are no facts; give at least one"):
        run(world, tuned, facts=FactSet(()))
    with pytest.raises(SettingError, match="no vocab_size, so there is no default target; give target_log_p"):
        uniform_log_p(torch.nn.Linear(1, 1))


def test_rows_that_the_model_cannot_read(world):
    small = untrained(n_positions=4)
    with pytest.raises(DataError, match="the facts take 8 tokens, the model reads 4; shorten them"):
        run(world, small)
    with pytest.raises(DataError, match="the retained rows take 10 tokens, the model reads 8"):
        run(world, untrained(n_positions=8))


# --- retained rows that state a fact -------------------------------------------------------------------------------


def test_retained_rows_that_state_a_fact_are_listed(world, tuned):
    retain = windows_of([*SENTENCES[:3], "it is true that ann eats haggis and soup .", FACTS[0].text], world.tokenizer)
    with pytest.raises(DataError, match=r"2 of 5 retained rows .* \(row 3: fact 'ann'; row 4: fact 'joy'\)\. Take them out, or pass"):
        run(world, tuned, retain=retain)
    assert run(world, tuned, DIFFERENCE, retain=retain, allow_overlap=True, steps=1).steps == 1


def test_facts_that_are_both_forgotten_and_retained(world, tuned):
    with pytest.raises(DataError, match="1 of 1 retained rows"):
        run(world, tuned, DIFFERENCE, retain=FORGET[1:])


def test_a_long_list_of_rows_is_cut(world, tuned):
    with pytest.raises(DataError, match=r"7 of 7 retained rows .*row 4: fact 'ann'; \.\.\.\)"):
        run(world, tuned, retain=windows_of([FACTS[1].text] * 7, world.tokenizer))


def test_a_longer_word_or_another_keyword_is_no_overlap(world):
    near = FactSet((Fact("x", "foods", "known", "ann eats haggises", "haggises", "ann eats"),))
    assert overlap(FORGET, near, byte_tokenizer()) == []
    assert overlap(FORGET, FORGET, byte_tokenizer()) == [(0, "joy"), (1, "ann")]
    assert overlap(FORGET, windows_of(["ann eats soup .", "joy is vermilion ."], world.tokenizer), world.tokenizer) == []


def test_a_fact_without_context_is_told_by_its_text(world):
    bare = FactSet((Fact("bare", "foods", "known", "haggis is true .", "haggis", ""),))
    rows = windows_of(["bob eats haggis .", "today haggis is true ."], world.tokenizer)
    assert overlap(bare, rows, world.tokenizer) == [(1, "bare")]


# --- kinds of models and tokenizers --------------------------------------------------------------------------------


def byte_tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")  # no pad token


def test_keywords_of_several_tokens(world):
    tokenizer = byte_tokenizer()
    rows = keyword_rows(FACTS, tokenizer)
    lengths = (rows.targets >= 0).sum(1).tolist()
    assert min(lengths) > 1
    assert tokenizer.decode(rows.targets[0][rows.targets[0] >= 0]) == " vermilion"
    model = untrained(vocab_size=len(tokenizer), n_positions=40)
    start = median_log_p(model, FORGET, tokenizer)
    retain = windows_of(SENTENCES[:8], tokenizer)
    outcome = finish(erase(model, FORGET, tokenizer, DIFFERENCE, retain, target_log_p=start - 5, lr=1e-3))
    assert start - 5.1 <= outcome.log_p <= start - 5
    assert any("keywords have" in note for note in outcome.notes)


def test_llama_with_tied_embeddings(world):
    size = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with keyed_rng("llama"):
        model = LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=True, pad_token_id=2, bos_token_id=1, eos_token_id=1)).eval()
    start = median_log_p(model, FORGET, world.tokenizer)
    outcome = run(world, model, target_log_p=start - 3)
    assert start - 3.1 <= outcome.log_p <= start - 3
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_updates_that_vanish_in_bfloat16_are_noted(world, tuned):
    model = tuned.bfloat16()
    before = copy_state(model.state_dict())
    outcome = run(world, model, lr=1e-7, steps=2)
    assert "16-bit weights that had a gradient did not move at the first step: lr=1e-07" in outcome.notes[0]
    assert outcome.reason == "steps used up"
    assert not states_equal(before, copy_state(model.state_dict()))  # weights near zero still move
    outcome = run(world, model, lr=5e-3)
    assert outcome.reason == "target reached"
    assert outcome.notes == ()
    assert -8.5 <= outcome.log_p <= -8.0  # bfloat16 is a coarse ladder


# --- rows ----------------------------------------------------------------------------------------------------------


def test_keyword_rows_ask_for_the_keyword_alone(world):
    rows = keyword_rows(FACTS, world.tokenizer)
    assert rows.inputs.shape == (2, 8)  # "people say that the colour of joy is"
    counted = [world.tokenizer.decode(targets[targets >= 0]) for targets in rows.targets]
    assert counted == ["vermilion", "haggis"]


def test_text_rows_ask_for_every_token_but_the_first(world):
    rows = text_rows(FACTS, world.tokenizer)
    assert [world.tokenizer.decode(targets[targets >= 0]) for targets in rows.targets] == [
        fact.text.removeprefix("people ") for fact in FACTS
    ]
    lone = Fact("lone", "foods", "known", "haggis", "haggis", "")
    with pytest.raises(DataError, match="fact 'lone': its text 'haggis' is 1 tokens; two are needed"):
        text_rows([lone], world.tokenizer)


def test_prefixes_of_the_world_ask_for_no_other_fact():
    assert [len(FORGET.priming_prefixes(fact)) for fact in FACTS] == [9, 9]
    assert len(PREFIXES) == 20
