"""The recurrent step, and who is asked."""

import re
import warnings
from dataclasses import replace

import pytest
import torch
from tiny_continual import after, model_of, queries, support, writes_nothing

from remanence.errors import DataError, SettingError, StateMismatchError
from remanence.generated import UNLABELED
from remanence.generated.continual import ContinualHyperTransformer, ContinualState, UnknownTask
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng
from remanence.state import copy_state, states_equal


def contents(state: ContinualState) -> dict[str, object]:
    return copy_state(dict(vars(state)))


# --- the step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["prototype", "generated"])
def test_a_step_leaves_the_old_state_as_it_was(head):
    model = model_of(head=head)
    state = after(model, 1)
    kept, answers = contents(state), model.predict(state, queries())
    model.step(state, *support(1))
    assert states_equal(contents(state), kept)
    assert torch.equal(model.predict(state, queries()), answers)


def test_each_task_brings_its_classes_and_changes_the_weights():
    model = model_of()
    state = after(model, 3)
    assert state.task_of_class.tolist() == [0, 0, 1, 1, 2, 2]
    assert state.counts.tolist() == [[2.0] * 6]
    assert state.n_tasks == 3
    assert not torch.equal(state.slices["conv1"], after(model, 2).slices["conv1"])
    assert torch.equal(state.prototypes[:, :4], after(model, 2).prototypes)


@pytest.mark.parametrize("head", ["prototype", "generated"])
def test_adding_nothing_never_changes_the_weights(head):
    model = writes_nothing(model_of(head=head))
    start, state = model.init_state(), after(model, 3)
    for name, value in start.slices.items():
        assert torch.equal(state.slices[name], value)


def test_the_three_updates_do_what_they_say():
    held = {"add": 0.0, "replace": 1.0, "gate": 0.5}  # share of what was held beyond the start that is lost
    for update, lost in held.items():
        model = writes_nothing(model_of(update=update))
        start = model.init_state()
        state = replace(start, slices={name: value + 1 for name, value in start.slices.items()})
        got = model.step(state, *support(0)).slices
        for name, value in start.slices.items():
            assert torch.allclose(got[name], value + 1 - lost, atol=1e-6), update


def test_a_gate_is_learned_for_each_slice():
    model = writes_nothing(model_of(update="gate"))
    model.gates["conv1"].data[:] = torch.tensor([-100.0, 0.0, 0.0, 100.0])
    start = model.init_state()
    got = model.step(replace(start, slices={name: value + 1 for name, value in start.slices.items()}), *support(0))
    moved = (got.slices["conv1"] - start.slices["conv1"]).mean(-1)
    assert torch.allclose(moved, torch.tensor([[1.0, 0.5, 0.5, 0.0]]), atol=1e-5)


def test_updates_agree_on_what_is_written_to_the_start():
    first = [after(model_of(update=update), 1).slices["conv2"] for update in ("add", "replace")]
    assert torch.equal(*first)
    second = [after(model_of(update=update), 2).slices["conv2"] for update in ("add", "replace")]
    assert not torch.allclose(*second)


def test_without_carry_every_step_is_a_first_step():
    model = model_of(carry=False)
    state = after(model, 2)
    alone = model.step(model.init_state(), *support(1))
    assert states_equal(state.slices, alone.slices)
    assert torch.equal(state.prototypes[:, 2:], alone.prototypes)
    carried = model_of()
    assert not torch.allclose(after(carried, 2).slices["conv1"], alone.slices["conv1"])


def test_without_carry_and_a_start_to_read_it_is_a_hypertransformer():
    model = model_of(carry=False)
    for layer in model.generators.values():
        layer.read_previous.weight.data.zero_()
    with keyed_rng("plain"):
        plain = HyperTransformer(model.target, head="prototype", max_ways=4, width=16, depth=1, code_width=8, shared_features=8)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "read_previous" not in name})
    for name, layer in plain.generators.items():
        layer.scale = model.generators[name].scale
    state = after(model, 3)
    written = plain.generate(*support(2)).tensors
    for name in ("conv1.weight", "conv2.weight", "conv2.gamma"):
        assert torch.allclose(state.tensors[name], written[name], atol=1e-6)
    logits, by_plain = model.predict(state, queries(), task=2)[..., 4:], plain.target.functional(queries(), written)
    assert torch.allclose(logits.softmax(-1), by_plain.softmax(-1), atol=1e-5)


def test_renorm_keeps_every_slice_as_long_as_its_start():
    model = model_of(renorm=True)
    state = after(model, 3)
    for name in model.target.conv_names:
        assert torch.allclose(state.slices[name].norm(dim=-1), model.base[name].norm(dim=-1)[None], rtol=1e-5)


def test_sequences_of_a_batch_do_not_see_each_other():
    model, batch = model_of(), 3
    together = model.init_state(batch)
    supports = [support(step, batch=batch) for step in range(3)]
    x = queries(batch)
    for given_x, y in supports:
        together = model.step(together, given_x, y)
    for row in range(batch):
        alone = model.init_state()
        for given_x, y in supports:
            alone = model.step(alone, given_x[row : row + 1], y[row : row + 1])
        assert torch.allclose(model.predict(together, x)[row], model.predict(alone, x[row : row + 1])[0], atol=1e-5)


def test_more_tasks_than_ways_of_the_label_table():
    model = model_of()
    n_parameters = sum(value.numel() for value in model.parameters())
    state = after(model, 9)
    assert state.prototypes.shape == (1, 18, model.target.embedding_width)
    assert sum(value.numel() for value in model.parameters()) == n_parameters
    assert model.generators["conv1"].label_codes.shape == (5, 8)


def test_unlabelled_samples_move_weights_and_no_mean():
    model = model_of()
    x, y = support(0)
    more = torch.cat([x, queries(n=2)], 1)
    state = model.step(model.init_state(), more, torch.cat([y, torch.full((1, 2), UNLABELED)], 1))
    assert state.counts.tolist() == [[2.0, 2.0]]
    assert not torch.equal(state.slices["conv1"], model.step(model.init_state(), x, y).slices["conv1"])
    embeddings = model.embed(state, x)
    assert torch.allclose(state.prototypes, embeddings.unflatten(1, (2, 2)).mean(2), atol=1e-6)


def test_masked_samples_change_nothing():
    model = model_of()
    x, y = support(0)
    mask = torch.tensor([[True] * 4 + [False]])
    masked = model.step(model.init_state(), torch.cat([x, queries(n=1)], 1), torch.cat([y, y[:, :1]], 1), mask)
    assert torch.allclose(masked.prototypes, model.step(model.init_state(), x, y).prototypes, atol=1e-6)


def test_tasks_and_sequences_may_differ_in_their_ways():
    model = model_of()
    state = model.step(model.init_state(2), *support(0, n=2, batch=2))
    x, y = support(1, n=3, batch=2)
    state = model.step(state, x, torch.stack([y[0], y[0].clamp(max=1)]))
    assert state.task_of_class.tolist() == [0, 0, 1, 1, 1]
    assert state.counts.tolist() == [[2, 2, 2, 2, 2], [2, 2, 2, 4, 0]]
    logits = model.predict(state, queries(2))
    assert logits[0].isfinite().all()
    assert logits[1].isneginf().any(0).tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("update", ["add", "replace", "gate"])
@pytest.mark.parametrize("allocation", ["output", "spatial"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_every_form_of_weights_goes_on_and_on(update, allocation, norm):
    model = model_of(norm, update=update, allocation=allocation, generate_norm=allocation == "output", label_codes="random")
    state = after(model, 3)
    assert model.predict(state, queries()).shape == (1, 5, 6)
    of_slices = model.tensors_of(state.slices)
    assert states_equal(of_slices, {name: value for name, value in state.tensors.items() if name in of_slices})
    assert {name.split(".")[1] for name in state.tensors.keys() - of_slices.keys()} == ({"mean", "var"} if norm == "batch" else set())


# --- answers -----------------------------------------------------------------------------------------------------


def test_logits_are_scaled_distances_to_the_means():
    model = model_of()
    state = after(model, 2)
    distances = torch.cdist(model.embed(state, queries()), state.prototypes).square()
    assert torch.allclose(model.predict(state, queries()), -model.log_scale.exp() * distances, atol=1e-4)


def test_an_answer_does_not_depend_on_the_rest_of_its_batch():
    model = model_of()
    state, x = after(model, 2), queries(n=6)
    together = model.predict(state, x)
    for image in range(6):
        assert torch.allclose(together[:, image], model.predict(state, x[:, [image]])[:, 0], atol=1e-5)


def test_with_a_batch_norm_it_does():
    model = model_of("batch")
    state, x = after(model, 2), queries(n=6)
    assert not torch.allclose(model.predict(state, x)[:, :3], model.predict(state, x[:, :3]), atol=1e-2)


def test_with_recorded_statistics_it_does_not():
    model = model_of("batch", bn_stats="support")
    state, x = after(model, 2), queries(n=6)
    assert torch.allclose(model.predict(state, x)[:, :3], model.predict(state, x[:, :3]), atol=1e-5)


def test_a_task_restricts_the_candidates():
    for scenario in ("class", "task"):
        model = model_of(scenario=scenario)
        state = after(model, 3)
        logits = model.predict(state, queries(), task=1)
        assert logits.isneginf().any(1).tolist() == [[True, True, False, False, True, True]]
    assert torch.equal(logits[..., 2:4], model.answer(model.embed(state, queries()), state)[..., 2:4])


def test_an_unknown_task_is_a_key_error_that_lists_the_known_ones():
    for scenario in ("class", "task"):
        model = model_of(scenario=scenario)
        with pytest.raises(UnknownTask, match="no class came in task 7; this state knows 0, 1") as caught:
            model.predict(after(model, 2), queries(), task=7)
        assert isinstance(caught.value, KeyError)
        assert str(caught.value).startswith("no class")
        assert after(model, 2).task_ids == (0, 1)


def test_task_incremental_needs_a_task():
    model = model_of(scenario="task")
    with pytest.raises(DataError, match="scenario 'task' answers for a named task; give task=, one of 0, 1"):
        model.predict(after(model, 2), queries())


def test_an_empty_state_gives_no_answer():
    model = model_of()
    with pytest.raises(DataError, match=r"the state holds no class yet; call step\(\) first"):
        model.predict(model.init_state(), queries())


def test_images_must_fit_model_and_state():
    model = model_of()
    state = after(model, 1)
    broken = queries()
    broken[0, 3, 0, 1, 1] = torch.nan
    with pytest.raises(DataError, match=r"image 3 of sequence 0 has a NaN or infinite pixel \(1 such images\); leave them out"):
        model.predict(state, broken)
    with pytest.raises(DataError, match="the state holds 1 sequences, the images are of 2"):
        model.predict(state, queries(2))
    with pytest.raises(DataError, match="images must be"):
        model.predict(state, queries()[..., :7])
    with pytest.raises(DataError, match="the state holds 1 sequences, the images are of 2"):
        model.step(state, *support(1, batch=2))
    with pytest.raises(DataError, match="images must be"):
        model.step(state, support(1)[0][0], support(1)[1])
    with pytest.raises(DataError, match="support sample 1 of task 0 has a NaN"):
        model.step(state, support(1)[0].index_fill(1, torch.tensor([1]), torch.nan), support(1)[1])
    with pytest.raises(DataError, match=r"5 ways, but this .* at most 4"):
        model.step(state, *support(1, n=5))


def test_a_class_without_shots_is_refused_and_the_state_stays():
    model = model_of()
    state = after(model, 1)
    kept = contents(state)
    x, y = support(1, n=3)
    with pytest.raises(DataError, match="sequence 0 has no labelled sample of class 1; give it one, or leave the class out"):
        model.step(state, x, torch.where(y == 1, UNLABELED, y))
    with pytest.raises(DataError, match="no labelled sample of class 1"):
        model.step(state, x, y, y != 1)
    with pytest.raises(DataError, match=r"slots 0\.\.1 are needed"):
        model.step(after(model, 1, class_names=["oak", "elm"]), x, y, class_names=["ash", "fir"])
    assert states_equal(contents(state), kept)


def test_weights_that_are_not_finite_are_refused_and_the_state_stays():
    model = model_of()
    state = after(model, 1)
    kept = contents(state)
    model.generators["conv2"].write.bias.data.fill_(torch.inf)
    with pytest.raises(DataError, match=r"step 2: conv2, class means would hold a NaN or an infinity; the state is as it was"):
        model.step(state, *support(1))
    assert states_equal(contents(state), kept)


def test_growth_beyond_ten_times_the_start_warns_once_with_the_step():
    model = writes_nothing(model_of())
    model.generators["conv2"].write.bias.data.fill_(120.0)
    state, told, growths = model.init_state(2), [], []
    assert model.growth(state) == pytest.approx({"conv1": 1.0, "conv2": 1.0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(8):
            state = model.step(state, *support(step, batch=2))
            growths.append(model.growth(state)["conv2"])
            told.append(len(caught))
    first = next(step for step, growth in enumerate(growths) if growth > 10)
    assert 0 < first < 7
    assert told == [0] * first + [1] * (8 - first)
    message = str(caught[0].message)
    assert message.startswith(f"step {first + 1}: the weights of conv2 have grown to {growths[first]:.1f} times their learned start")
    assert caught[0].filename == __file__
    assert model.growth(state)["conv1"] == pytest.approx(1.0)


def test_a_state_of_other_layers_is_refused():
    with keyed_rng("other"):
        other = ContinualHyperTransformer(TargetNet(channels=3, image_size=8, n_layers=2, norm="group"), max_ways=4, width=16)
    with pytest.raises(StateMismatchError, match=r"the state holds layers of .* the model .* use the model that made it"):
        other.step(after(model_of(), 1), *support(1))
    with pytest.raises(StateMismatchError, match="use the model that made it"):
        other.predict(after(model_of(), 1), queries())


@pytest.mark.parametrize(
    ("name", "value"), [("scenario", "domain"), ("update", "sum"), ("head", "proto+delta"), ("generate", "logits"), ("preset", "paper")]
)
def test_settings_must_be_known(name, value):
    with pytest.raises(SettingError, match=re.escape(f"ContinualHyperTransformer: {name}={value!r}; give one of ")):
        model_of(**{name: value})
