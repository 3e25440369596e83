"""Weights that were written: as plain modules, on disk, through torch.export and ONNX, and differentiable."""

import logging
import warnings
from collections import OrderedDict
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from remanence.errors import StateMismatchError
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import EPS, TargetNet
from remanence.generated.task_weights import TaskWeights
from remanence.parts import export_onnx
from remanence.state import load_state, save_state, states_equal
from remanence.streams import digits

WRITERS = [
    {},
    {"generate": "logits"},
    {"generate": ("conv2",), "head": "prototype"},
    {"generate_norm": True, "head": "generated"},
    {"allocation": "spatial"},
]
SMALL = TargetNet(channels=4, in_channels=2, image_size=13, n_layers=2)
SUPPORT_Y = torch.tensor([[0, 1, 2, 0, 1, 2, 2, -1], [4, 3, 2, 1, 0, 0, -1, 1]])
"""Tasks of 3 and of 5 ways."""


def pixels(n_images, target=SMALL, n_tasks=2, dtype=torch.float32, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n_tasks, n_images, target.in_channels, target.image_size, target.image_size, generator=draw, dtype=dtype)


def written(target=SMALL, dtype=torch.float32, labels=SUPPORT_Y, grad=False, allow_empty=False, **settings):
    """What an untrained writer makes of random images; nothing that it holds is left at 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HyperTransformer(target, max_ways=5, width=16, depth=1, heads=2, code_width=8, shared_features=8, **settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    with torch.set_grad_enabled(grad):
        support = pixels(labels.shape[1], target, len(labels), dtype, seed=0)
        return model.to(dtype).generate(support, labels, allow_empty=allow_empty)


def from_digits(norm, slots=(0, 1, 2, 3, 4)):
    """Weights of the usual net from five images of each digit, and ten further images (N, 1, 28, 28)."""
    source = digits()
    images = nn.functional.interpolate(source.images, 28, mode="bilinear")
    rows = torch.stack([(source.labels == slot).nonzero()[:7, 0] for slot in slots])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HyperTransformer(TargetNet(norm=norm), max_ways=5, width=16, depth=1, heads=2, code_width=8, shared_features=8)
    labels = torch.tensor(slots).repeat_interleave(5)
    with torch.no_grad():
        weights = model.generate(images[rows[:, :5].flatten()][None], labels[None], allow_empty=True)
    return weights, images[rows[:, 5:].flatten()]


# --- modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("settings", WRITERS, ids=str)
def test_a_module_answers_as_the_weights_it_came_from(settings, norm, dtype, tolerance):
    weights = written(replace(SMALL, norm=norm), dtype, **settings)
    x = pixels(6, dtype=dtype)
    wanted = weights.logits(x, "support")
    assert wanted[0, :, 3:].isneginf().all()
    for task, ways in enumerate((3, 5)):
        found = weights.to_module(task)(x[task])
        assert found.shape == (6, ways)
        torch.testing.assert_close(found, wanted[task, :, :ways], atol=tolerance, rtol=0)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_usual_net_on_real_images_gives_a_module_that_answers_alike(norm):
    weights, x = from_digits(norm)
    assert (weights.to_module()(x) - weights.logits(x[None])[0]).abs().max() <= 1e-5


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 3e-6), (torch.float64, 1e-14)])
def test_on_noise_rounding_grows_with_the_logits_but_no_further(dtype, share):
    # 1e-5 itself does not hold here in float32: one image of noise a class, an untrained net
    target = TargetNet()
    weights, x = written(target, dtype, labels=torch.arange(5).expand(3, 5)), pixels(15, target, n_tasks=3, dtype=dtype)
    found, wanted = torch.stack([one.to_module()(images) for one, images in zip(weights, x, strict=True)]), weights.logits(x)
    assert (found - wanted).abs().max() <= share * wanted.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_query_alone_is_answered_as_among_others(norm, dtype, tolerance):
    weights, x = written(replace(SMALL, norm=norm), dtype), pixels(6, dtype=dtype)
    cnn = weights.to_module(1)
    together = cnn(x[1])
    for image in range(6):
        assert (cnn(x[1, image : image + 1])[0] - together[image]).abs().max() <= tolerance
        assert (weights.logits(x[:, image : image + 1])[1, 0] - together[image]).abs().max() <= tolerance


def test_statistics_of_the_queries_are_another_answer():
    weights, x = written(), pixels(6)
    assert (weights.logits(x, "query")[1] - weights.to_module(1)(x[1])).abs().max() > 1e-2


@pytest.mark.parametrize(("norm", "kind"), [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_a_module_is_plain_and_frozen_and_owns_its_memory(norm, kind):
    weights, x = written(replace(SMALL, norm=norm), grad=True), pixels(3)[0]
    before = torch.get_rng_state()
    cnn = weights.to_module()
    assert torch.equal(torch.get_rng_state(), before)
    assert type(cnn) is nn.Sequential
    assert [type(layer) for layer in cnn] == 2 * [nn.Conv2d, nn.ReLU, nn.MaxPool2d, kind] + [nn.Flatten, nn.Linear]
    assert all(cnn.get_submodule(f"norm{number}").eps == EPS for number in (1, 2))
    assert not any(module.training for module in cnn.modules())
    assert not any(parameter.requires_grad for parameter in cnn.parameters())
    wanted = cnn(x)
    with torch.no_grad():
        for value in weights.tensors.values():
            value.detach().zero_()
    assert torch.equal(cnn(x), wanted)
    cnn.conv1.weight.zero_()
    assert not torch.equal(cnn(x), wanted)


def test_a_module_s_own_file_fits_layers_made_by_hand(tmp_path):
    cnn, x = written().to_module(1), pixels(3)[1]
    safetensors.torch.save_file(cnn.state_dict(), tmp_path / "plain.safetensors")
    layers = OrderedDict[str, nn.Module]()
    for number, width in ((1, 2), (2, 4)):
        layers[f"conv{number}"] = nn.Conv2d(width, 4, 3, padding=1, bias=False)
        layers |= {f"relu{number}": nn.ReLU(), f"pool{number}": nn.MaxPool2d(2), f"norm{number}": nn.BatchNorm2d(4, eps=1e-3)}
    by_hand = nn.Sequential(layers | {"flatten": nn.Flatten(), "logits": nn.Linear(36, 5)}).eval()
    by_hand.load_state_dict(safetensors.torch.load_file(tmp_path / "plain.safetensors"))
    assert torch.equal(by_hand(x), cnn(x))


def test_a_class_without_samples_stays_impossible():
    weights = written(labels=torch.tensor([[0, 2, 2, 0]]), allow_empty=True)
    cnn = weights.to_module()
    assert cnn.logits.bias.isneginf().tolist() == [False, True, False]
    assert cnn(pixels(4)[0]).softmax(-1)[:, 1].eq(0).all()


# --- many tasks ----------------------------------------------------------------------------------------------------


def test_tasks_are_counted_from_both_ends_and_iteration_ends():
    weights = written()
    assert [int(one.ways) for one in weights] == [3, 5]
    assert states_equal(weights[-1].tensors, weights[1].tensors)
    for read in (weights.__getitem__, weights.to_module):
        for index in (2, -3):
            with pytest.raises(IndexError, match=f"task {index} was asked for and these are weights of 2 tasks; count from 0"):
                read(index)
    with pytest.raises(IndexError, match="weights of 1 task; count"):
        weights[0][1]


@pytest.mark.parametrize("settings", [{}, {"generate": "logits"}], ids=str)
def test_one_task_of_many_answers_as_among_them(settings):
    weights, x = written(**settings), pixels(4)
    wanted = weights.logits(x)
    for task, one in enumerate(weights):
        assert len(one) == 1
        torch.testing.assert_close(one.logits(x[task : task + 1])[0], wanted[task], atol=1e-5, rtol=0)


def test_the_size_is_told_per_task():
    target = TargetNet(channels=8, norm="group")
    weights = written(target, labels=torch.arange(5).expand(64, 5), head="prototype")
    assert str(weights) == "64 tasks of 5 ways: 7,636 bytes each"
    assert repr(weights[0]) == "<TaskWeights, 1 task of 5 ways: 7,636 bytes>"
    assert weights.nbytes == 64 * 7636
    assert sum(value.nbytes for value in weights.to_module().state_dict().values()) == 7636
    assert str(written()).startswith("2 tasks of 3 to 5 ways: ")


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_gives_the_weights_back(tmp_path, dtype):
    names = (("oak", "elm", "ash"), ("0", "1", "2", "3", "4"))
    weights = replace(written(dtype=dtype, grad=True, generate=("conv1",)), class_names=names)
    weights.save(tmp_path / "deep" / "trees.safetensors")
    loaded = TaskWeights.load(tmp_path / "deep" / "trees.safetensors", target=weights.target)
    assert states_equal(loaded.tensors, weights.tensors)
    assert torch.equal(loaded.ways, weights.ways)
    assert (loaded.target, loaded.class_names) == (weights.target, names)
    assert not any(value.requires_grad for value in loaded.tensors.values())
    with safetensors.safe_open(tmp_path / "deep" / "trees.safetensors", framework="pt") as file:
        assert len(file.keys()) == len(weights.tensors) + 1


def test_one_task_is_kept_by_itself(tmp_path):
    weights, x = replace(written(), class_names=(("oak", "elm", "ash"), ("0", "1", "2", "3", "4"))), pixels(3)
    weights[1].save(str(tmp_path / "one.safetensors"))
    loaded = TaskWeights.load(str(tmp_path / "one.safetensors"))
    assert (len(loaded), loaded.class_names) == (1, (("0", "1", "2", "3", "4"),))
    assert torch.equal(loaded.to_module()(x[1]), weights.to_module(1)(x[1]))


def test_weights_for_another_net_are_refused_field_by_field(tmp_path):
    path = tmp_path / "weights.safetensors"
    written().save(path)
    message = "another CNN: channels is 4 there and 8 here, norm is 'batch' there and 'group' here. Give the target that they"
    with pytest.raises(StateMismatchError, match=message):
        TaskWeights.load(path, replace(SMALL, channels=8, norm="group"))


def test_files_that_hold_no_weights_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    written().save(path)
    save_state(tmp_path / "other.safetensors", {"step": 3})
    with pytest.raises(StateMismatchError, match=r"other\.safetensors is a state, but not one of task weights; give a file"):
        TaskWeights.load(tmp_path / "other.safetensors")
    state = load_state(path)
    state["task_weights"]["format"] = 2
    save_state(tmp_path / "newer.safetensors", state)
    with pytest.raises(StateMismatchError, match=r"newer\.safetensors is of format 2, this version reads 1"):
        TaskWeights.load(tmp_path / "newer.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(StateMismatchError, match="is not a whole remanence state"):
        TaskWeights.load(path)
    with pytest.raises(FileNotFoundError):
        TaskWeights.load(tmp_path / "absent.safetensors")


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_torch_export_with_a_free_batch_axis(norm):
    cnn, x = written(replace(SMALL, norm=norm)).to_module(1), pixels(8)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, from inside its exporter
        program = torch.export.export(cnn, (x[:3],), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for batch in (1, 3, 8):
        assert (program.module()(x[:batch]) - cnn(x[:batch])).abs().max() <= 1e-5


@pytest.mark.parametrize(("norm", "n_example"), [("batch", 1), ("group", 3)])
def test_onnx_answers_alike_for_one_image_and_several(norm, n_example, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    weights, x = from_digits(norm, slots=(0, 1, 3, 4))
    cnn = weights.to_module()
    size = export_onnx(cnn, x[:n_example], tmp_path / "cnn.onnx")
    assert size == (tmp_path / "cnn.onnx").stat().st_size > weights.nbytes
    assert [file.name for file in tmp_path.iterdir()] == ["cnn.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "cnn.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits"]
    for batch in (1, 3, 8):
        found = torch.from_numpy(session.run(None, {"pixels": x[:batch].numpy()})[0])
        assert found[:, 2].isneginf().all()
        torch.testing.assert_close(found, cnn(x[:batch]), atol=1e-5, rtol=0)


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "bn_stats"), [("batch", "query"), ("batch", "support"), ("group", "support")])
def test_gradients_reach_every_written_number(norm, bn_stats):
    target = TargetNet(channels=2, image_size=8, n_layers=2, norm=norm)
    weights = written(target, torch.float64, labels=torch.tensor([[0, 1, 1], [1, 0, 0]]))
    names = [name for name in weights.tensors if bn_stats == "support" or not name.endswith((".mean", ".var"))]
    values = [weights.tensors[name].clone().requires_grad_() for name in names]
    x = pixels(3, target, dtype=torch.float64)

    def answer(*given):
        return target.functional(x, dict(zip(names, given, strict=True)), bn_stats)

    assert torch.autograd.gradcheck(answer, values)
    gradients = torch.autograd.grad(answer(*values).square().sum(), values)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
