"""Token by token: steps, generation, and models that are saved and loaded."""

import json

import pytest
import torch
from context_models import SIZES, VOCAB, WINDOW, ZOO, close, every, every_kind, fresh, ids, in_pieces, same_memory, shared, start
from safetensors import safe_open
from transformers import AutoConfig

from remanence.context import TransformerXL, TransformerXLConfig
from remanence.context.kinds import load_context_model
from remanence.context.model import sample
from remanence.errors import DataError
from remanence.keys import generator, keyed_rng
from remanence.state import states_equal


def written(model, prompt, state=None, n=12, **settings):
    return torch.stack(list(model.generate(prompt, state, max_new_tokens=n, **settings or {"temperature": 0})), dim=1)


# --- steps -----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("before", range(WINDOW))
def test_a_step_is_a_call_at_every_alignment(name, before):
    model, tokens = shared(name), ids(2, before + 7, "align")
    _, state = model(tokens[:, :before], start(model, 2))
    whole, after = model(tokens[:, before:], state)
    for cuts in (range(1, 7), (2, 5)):
        logits, stepped = in_pieces(model.step, tokens[:, before:], state, cuts)
        close(logits, whole)
        same_memory(stepped, after)


@every
def test_rows_step_wherever_each_stands_in_its_window(name):
    """Rows with 0 to 3 tokens of a window, one in its first document, one after a reset, one that has read nothing."""
    model, on = shared(name), ids(5, 9, "ragged on")
    lengths, reset = torch.tensor([0, 1, 6, 11, 12]), torch.zeros(5, 12, dtype=torch.bool)
    reset[3, 9] = True
    _, state = model(ids(5, 12, "ragged"), start(model, 5), lengths, reset)
    assert state.n_tail.tolist() == [0, 1, 2, 2, 0]
    whole, after = model(on, state)
    logits, stepped = in_pieces(model.step, on, state, range(1, 9))
    close(logits, whole)
    same_memory(stepped, after)


@every_kind
def test_rows_that_are_chosen_again_step_on(name):
    """A beam search: rows are repeated and dropped between steps, their caches with them."""
    model, rows = shared(name), torch.tensor([1, 1, 0])
    tokens, on = ids(2, 6, "beam"), ids(3, 5, "beam on")
    _, state = model.step(tokens[:, 4:], model(tokens[:, :4], start(model, 2))[1])
    logits, after = in_pieces(model.step, on, state.index_select(rows), (1, 2, 3))
    whole, plain = model(on, model(tokens[rows], start(model, 3))[1])
    close(logits, whole)
    same_memory(after, plain)


@every_kind
def test_steps_in_place_write_into_the_cache_alone(name):
    model, on = shared(name), ids(1, 2, "in place")
    _, state = model(ids(1, 5, "in place"), start(model, 1))
    _, state = model.step(on[:, :1], state)
    kept = state.fork()
    expected, _ = model.step(on[:, 1:], kept)
    logits, _ = model.step(on[:, 1:], state, in_place=True)
    assert torch.equal(logits, expected)
    assert states_equal(state.state_dict(), kept.state_dict())
    assert not states_equal(state.cache, kept.cache)


@every_kind
def test_steps_between_calls_and_no_gradient_from_them(name):
    model, tokens = fresh(name), ids(1, 13, "between")
    one, state = model(tokens[:, :5], start(model, 1))
    two, state = model.step(tokens[:, 5:6], state)
    three, _ = model(tokens[:, 6:], state)
    close(torch.cat([one, two, three], 1), model(tokens, start(model, 1))[0])
    assert not two.requires_grad


# --- generation --------------------------------------------------------------------------------------------------------


@every
def test_generation_continues_as_reading_all_of_it_would(name):
    """Every kind generates, those with recurrence too; the released Block-Recurrent code could not."""
    model, prompt = shared(name), ids(2, 6, "prompt")
    new = written(model, prompt)
    assert new.shape == (2, 12)
    logits, _ = model(torch.cat([prompt, new], dim=1))
    assert torch.equal(logits[:, 5:-1].argmax(-1), new)


@every_kind
def test_generation_leaves_the_callers_state_as_it_was(name):
    model = shared(name, torch.float32)
    _, state = model.step(ids(2, 3, "kept"), model(ids(2, 7, "kept"))[1])
    kept = state.fork()
    first = written(model, ids(2, 2, "prompt"), state)
    assert states_equal(state.state_dict(), kept.state_dict())
    assert states_equal(state.cache, kept.cache)
    assert torch.equal(written(model, ids(2, 2, "prompt"), state), first)


@every_kind
def test_every_token_is_read_once(name, monkeypatch):
    """transformers 4752: the whole prompt was fed again on top of the memory at every step."""
    model, read, tokens = fresh(name), [], ids(1, 9, "once")

    def listen(verb, plain):
        def heard(*given, **named):
            read.append((verb, given[0]))
            return plain(*given, **named)

        monkeypatch.setattr(model, verb, heard)

    for verb in ("forward", "step"):
        listen(verb, getattr(model, verb))
    new = written(model, tokens, n=5)
    prompts = [given for verb, given in read if verb == "forward" and given.shape[1] > 1]
    assert len(prompts) == 1
    assert torch.equal(prompts[0], tokens)
    steps = [given for verb, given in read if verb == "step"]
    assert torch.equal(torch.cat(steps, dim=1)[:, :4], new[:, :4])


@every_kind
def test_a_prompt_may_be_read_before(name):
    model, prompt = shared(name), ids(1, 10, "before")
    _, state = model(prompt[:, :9], start(model, 1))
    assert torch.equal(written(model, prompt[:, 9:], state), written(model, prompt, start(model, 1)))


def test_drawing_is_decided_by_the_generator():
    model, prompt = shared("melodi"), ids(3, 2, "draw")
    draw = [written(model, prompt, n=20, temperature=1.0, generator=generator("draw", seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    random = torch.get_rng_state()
    written(model, prompt, temperature=0.5, top_k=2, generator=generator("draw"))
    assert torch.equal(torch.get_rng_state(), random)


def test_sampling():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).repeat(4000, 1)
    assert sample(logits, 0, None, None).unique().tolist() == [1]
    assert sample(logits, 1e-3, None, generator("sample")).unique().tolist() == [1]
    assert sample(logits, 5.0, 2, generator("sample")).unique().tolist() == [1, 3]
    assert sample(logits, 5.0, 99, generator("sample")).unique().tolist() == [0, 1, 2, 3]
    found = sample(logits, 2.0, None, generator("sample")).bincount(minlength=4) / 4000
    close(found, (logits[0] / 2).softmax(-1), 0.03)
    assert torch.equal(sample(logits, 1.0, 1, generator("sample")), logits.argmax(-1))


@every_kind
def test_memory_of_a_long_generation_does_not_grow(name, monkeypatch):
    model, sizes = fresh(name, torch.float32), []
    plain = model.step

    def step(*given, **named):
        logits, state = plain(*given, **named)
        sizes.append(state.nbytes("all"))
        return logits, state

    monkeypatch.setattr(model, "step", step)
    for _ in model.generate(ids(1, 2, "long"), max_new_tokens=80, temperature=0):
        pass
    assert len(set(sizes[-4 * WINDOW :])) == len(set(sizes)) == 2  # with a cache, and without one where a window has just completed
    assert max(sizes[-WINDOW:]) == max(sizes)


def test_generation_of_nothing_and_of_no_rows():
    model = shared("melodi")
    assert list(model.generate(ids(1, 3, "nothing"), max_new_tokens=0, temperature=0)) == []
    assert [token.shape for token in model.generate(ids(0, 3, "rows"), max_new_tokens=2, temperature=0)] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, r"a prompt of shape \(1, 0\); give \(B, T\) with at least one token"),
        (torch.zeros(3, dtype=torch.int64), {}, r"a prompt of shape \(3,\)"),
        (torch.zeros(1, 1, dtype=torch.int64), {"temperature": -1}, "temperature=-1 must be 0 or more, top_k=None 1 or more"),
        (torch.zeros(1, 1, dtype=torch.int64), {"temperature": 0, "top_k": 0}, "temperature=0 must be 0 or more, top_k=0 1 or more"),
        (torch.zeros(1, 1, dtype=torch.int64), {}, r"drawing needs a generator=torch.Generator\(\)"),
    ],
)
def test_generation_that_is_refused_at_once(prompt, settings, message):
    with pytest.raises(DataError, match=message):
        shared("melodi").generate(prompt, **settings)


# --- saved and loaded ------------------------------------------------------------------------------------------------------


@every
def test_a_saved_model_answers_bit_for_bit_alike(name, tmp_path):
    model, tokens = fresh(name, torch.float32), ids(2, 14, "saved")
    expected, state = model(tokens)
    model.save_pretrained(tmp_path / "model")
    random = torch.get_rng_state()
    for loaded in (load_context_model(tmp_path / "model"), type(model).from_pretrained(tmp_path / "model")):
        assert type(loaded) is type(model)
        assert not loaded.training
        assert states_equal(dict(loaded.state_dict()), dict(model.state_dict()))  # nothing was drawn anew
        assert torch.equal(loaded(tokens)[0], expected)
        assert loaded.config.fingerprint() == model.config.fingerprint()
        assert torch.equal(loaded(tokens, state.detach())[0], model(tokens, state.detach())[0])
    assert torch.equal(torch.get_rng_state(), random)
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())


def test_a_model_in_bfloat16_is_saved_and_loaded_as_it_is(tmp_path):
    model = fresh("melodi", torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    loaded = load_context_model(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(ids(1, 9, "half"))[0], model(ids(1, 9, "half"))[0])
    assert loaded.init_state(1).short.dtype == torch.float32


def test_folders_that_hold_no_model(tmp_path):
    with pytest.raises(DataError, match=r"holds no config.json; give a folder that `remanence context train`, or save_pretrained"):
        load_context_model(tmp_path)
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"holds a 'gpt2' model; the context models are remanence-block-recurrent, remanence-melodi"):
        load_context_model(tmp_path)


@every
def test_the_first_loss_is_near_chance(name):
    """A new model, as it is initialised, knows nothing: log V nats and some for logits of unit size."""
    with keyed_rng("chance", name):
        model = ZOO[name](hidden_size=32)
    tokens = ids(4, 40, "chance")
    loss, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    chance = torch.tensor(float(VOCAB)).log()
    assert chance - 0.2 < loss < chance + 1.2
    assert model.config.hidden_size % SIZES["num_attention_heads"] == 0


def test_a_folder_that_lacks_tensors_is_refused(tmp_path):
    config = TransformerXLConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, window=4, cache=4)
    TransformerXL(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 2}))
    with pytest.raises(DataError, match=r"lacks \d+ tensors of its own config.json \(first: layers.1"):
        load_context_model(tmp_path)
