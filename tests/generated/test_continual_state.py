"""A state on disk, on a device, and in bytes."""

import pytest
import torch

from remanence.errors import StateMismatchError
from remanence.generated.continual import ContinualHyperTransformer, ContinualState
from remanence.generated.files import load_hypertransformer, save_hypertransformer
from remanence.generated.target import TargetNet
from remanence.keys import generator, keyed_rng
from remanence.state import load_state, save_state, states_equal


def small(seed: int = 0, norm: str = "group", **given_settings: object) -> ContinualHyperTransformer:
    with keyed_rng("model", seed):
        target = TargetNet(channels=4, image_size=8, n_layers=2, norm=norm)
        return ContinualHyperTransformer(target, max_ways=5, width=16, depth=1, code_width=8, shared_features=8, **given_settings).eval()


def task(step: int, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(1, 2 * n, 1, 8, 8, generator=generator("task", step)), torch.arange(n).repeat(2)[None]


def told(model: ContinualHyperTransformer, n_tasks: int, **named: object) -> ContinualState:
    state = model.init_state()
    with torch.no_grad():
        for step in range(n_tasks):
            state = model.step(state, *task(step), **named)
    return state


def same(first: ContinualState, second: ContinualState) -> bool:
    return states_equal(dict(vars(first)), dict(vars(second)))


# --- state -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch"])
@pytest.mark.parametrize("head", ["prototype", "generated"])
@pytest.mark.parametrize("n_tasks", [0, 1, 3])
def test_a_loaded_state_goes_on_with_the_same_bits(tmp_path, norm, head, n_tasks):
    model = small(norm=norm, head=head, scenario="minibatch", bn_stats="support")
    state = told(model, n_tasks, class_names=["oak", "elm", "ash"])
    state.save(tmp_path / "run" / "state.safetensors", model)
    loaded = ContinualState.load(tmp_path / "run" / "state.safetensors", model)
    assert same(loaded, state)
    assert loaded.class_names == (("oak", "elm", "ash") if n_tasks else ())
    following = [model.step(start, *task(9)) for start in (loaded, state)]
    assert same(*following)
    if n_tasks:
        assert torch.equal(model.predict(loaded, task(0)[0]), model.predict(state, task(0)[0]))


def test_a_model_from_its_files_takes_its_state(tmp_path):
    model = small()
    state = told(model, 2)
    save_hypertransformer(model, tmp_path / "model")
    state.save(tmp_path / "state.safetensors", model)
    again = load_hypertransformer(tmp_path / "model")
    assert same(again.step(ContinualState.load(tmp_path / "state.safetensors", again), *task(5)), model.step(state, *task(5)))


def test_a_state_of_another_model_is_refused(tmp_path):
    model = small()
    told(model, 2).save(tmp_path / "state", model)
    for other in (small(seed=1), small(renorm=True)):
        with pytest.raises(StateMismatchError, match=r"was made by model [0-9a-f]+, this one is [0-9a-f]+: its class means"):
            ContinualState.load(tmp_path / "state", other)
    with torch.no_grad():
        model.log_scale.add_(1e-3)
    with pytest.raises(StateMismatchError, match="was made by model"):
        ContinualState.load(tmp_path / "state", model)


def test_a_state_is_not_saved_under_a_model_of_other_layers(tmp_path):
    with keyed_rng("wide"):
        wide = ContinualHyperTransformer(TargetNet(channels=6, image_size=8, n_layers=2, norm="group"))
    with pytest.raises(StateMismatchError, match=r"use the model that made it, or begin with its init_state\(\)"):
        told(small(), 1).save(tmp_path / "state", wide)
    assert not (tmp_path / "state").exists()


def test_other_files_are_refused(tmp_path):
    save_state(tmp_path / "other", {"step": 3})
    with pytest.raises(StateMismatchError, match=r"holds no ContinualState of format 1; give a file that ContinualState.save wrote"):
        ContinualState.load(tmp_path / "other", small())
    save_state(tmp_path / "list", [1, 2])
    with pytest.raises(StateMismatchError, match="holds no ContinualState"):
        ContinualState.load(tmp_path / "list", small())
    (tmp_path / "torn").write_bytes(b"\x00" * 40)
    with pytest.raises(StateMismatchError, match="is not a whole remanence state"):
        ContinualState.load(tmp_path / "torn", small())


def test_the_file_holds_no_cnn_beside_its_slices(tmp_path):
    model = small()
    state = told(model, 2)
    state.save(tmp_path / "state", model)
    saved = load_state(tmp_path / "state")
    assert saved["statistics"] == {}
    assert (tmp_path / "state").stat().st_size < state.num_bytes + 2500


@pytest.mark.parametrize("n", [2, 5])
def test_a_task_costs_its_means_and_twelve_bytes_a_class(n):
    model, state, bytes_of = small(), small().init_state(), []
    for step in range(4):
        before = (state.prototypes.nbytes, state.num_bytes)
        state = model.step(state, *task(step, n))
        bytes_of.append((state.prototypes.nbytes - before[0], state.num_bytes - before[1]))
    d = model.target.embedding_width
    assert bytes_of == [(d * n * 4, d * n * 4 + 12 * n)] * 4
    slices = 4 * (4 * 9 + 4 * 36)
    assert state.num_bytes == slices + 4 * n * (4 * d + 12)


def test_recorded_statistics_count():
    model = small(norm="batch")
    assert told(model, 1).num_bytes - told(small(), 1).num_bytes == 4 * 2 * 4 * 2  # mean and variance of two layers of four channels


def test_a_state_moves_and_forgets_its_graph():
    model = small()
    state = model.step(model.init_state(), *task(0))
    assert state.prototypes.requires_grad
    assert not any(value.requires_grad for value in (*state.detach().slices.values(), *state.detach().tensors.values()))
    moved = state.to("meta")
    assert {value.device.type for value in (*moved.slices.values(), *moved.tensors.values(), moved.counts, moved.task_of_class)} == {"meta"}
    assert same(state.to("cpu"), state)
    assert len(state) == 1


@pytest.mark.gpu
def test_a_state_goes_on_where_the_model_is(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    model = small()
    state = told(model, 2)
    model.cuda()
    state.save(tmp_path / "state", model)
    x, y = (part.cuda() for part in task(2))
    following = model.step(ContinualState.load(tmp_path / "state", model), x, y, slots=torch.tensor([0, -1, 2]))
    wanted = small().step(state, x.cpu(), y.cpu(), slots=torch.tensor([0, -1, 2]))
    assert following.prototypes.is_cuda
    assert torch.allclose(following.prototypes.cpu(), wanted.prototypes, atol=1e-3)
