"""The CNN whose weights are written: the grouped path against a loop over tasks, slices against kernels, refusals.

Axes: B tasks, N images, C channels, n ways.
"""

import pytest
import torch
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.generated.heads import class_means, prototype_layer, squared_distances
from remanence.generated.target import TargetNet
from remanence.generated.weight_generator import assemble, cut, slice_layout

B, N, WAYS = 3, 5, 4
SMALL = {"channels": 3, "in_channels": 2, "image_size": 9, "n_layers": 2}  # odd, so that pooling rounds down: 9, 4, 2


def made(target, dtype=torch.float64, tasks=B, seed=0):
    """Tensors of B tasks, with statistics as if recorded, and images (B, N, C, H, W)."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    tensors = {"logits.weight": normal(tasks, WAYS, target.embedding_width), "logits.bias": normal(tasks, WAYS)}
    for name in target.conv_names:
        tensors |= {
            f"{name}.weight": normal(tasks, *target.kernel_shape(name)), f"{name}.gamma": 1 + 0.3 * normal(tasks, target.channels),
            f"{name}.beta": normal(tasks, target.channels), f"{name}.mean": normal(tasks, target.channels),
            f"{name}.var": normal(tasks, target.channels).square() + 0.1,
        }  # fmt: skip
    return tensors, normal(tasks, N, target.in_channels, target.image_size, target.image_size)


def one_task(target, x, tensors, bn_stats):
    """The plain network of one task: x (N, C, H, W), tensors without a task axis."""
    for name in target.conv_names:
        x = F.max_pool2d(F.relu(F.conv2d(x, tensors[f"{name}.weight"], padding=1)), 2)
        affine = (tensors[f"{name}.gamma"], tensors[f"{name}.beta"])
        if target.norm == "group":
            x = F.group_norm(x, 1, *affine, eps=1e-3)
        elif bn_stats == "support":
            mean, var, gamma, beta = (tensors[f"{name}.{part}"][:, None, None] for part in ("mean", "var", "gamma", "beta"))
            x = gamma * (x - mean) / (var + 1e-3).sqrt() + beta  # F.batch_norm gives recorded statistics no gradient
        else:
            x = F.batch_norm(x, None, None, *affine, training=True, eps=1e-3)
    return F.linear(x.flatten(1), tensors["logits.weight"], tensors["logits.bias"])


def by_loop(target, x, tensors, bn_stats):
    rows = ({name: value[b] for name, value in tensors.items()} for b in range(len(x)))
    return torch.stack([one_task(target, images, row, bn_stats) for images, row in zip(x, rows, strict=True)])


@pytest.mark.parametrize(("norm", "bn_stats"), [("batch", "query"), ("batch", "support"), ("group", "query")])
def test_grouped_tasks_agree_with_a_loop_over_tasks_in_value_and_gradient(norm, bn_stats):
    target = TargetNet(norm=norm, **SMALL)
    tensors, x = made(target)
    upstream = torch.randn(B, N, WAYS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = []
    for network in (target.functional, lambda *given: by_loop(target, *given)):
        leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()}
        images = x.clone().requires_grad_()
        logits = network(images, leaves, bn_stats)
        grads = torch.autograd.grad((logits * upstream).sum(), [images, *leaves.values()], allow_unused=True)
        found.append([logits, *grads])
    for name, ours, wanted in zip(["logits", "x", *tensors], *found, strict=True):
        assert (ours is None) == (wanted is None), name
        if ours is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_by_the_weights_are_right():
    target = TargetNet(channels=2, image_size=4, n_layers=2)
    tensors, x = made(target, tasks=2)
    names = sorted(name for name in tensors if not name.endswith((".mean", ".var")))
    torch.autograd.gradcheck(
        lambda *values: target.functional(x, dict(zip(names, values, strict=True))), [tensors[name].requires_grad_() for name in names]
    )


def test_kernels_without_a_task_axis_are_shared():
    target = TargetNet(**SMALL)
    tensors, x = made(target)
    shared = tensors | {"conv1.weight": tensors["conv1.weight"][0]}
    every = tensors | {"conv1.weight": tensors["conv1.weight"][:1].expand(B, -1, -1, -1, -1)}
    torch.testing.assert_close(target.functional(x, shared), target.functional(x, every))


def test_the_normalisation_adds_a_thousandth_to_the_variance():
    target = TargetNet(channels=1, image_size=2, n_layers=1)
    x = torch.tensor([0.0, 0.02])[:, None, None, None]  # variance 1e-4, which another epsilon would show
    y = target.normalise(x, torch.ones(1, 1), torch.zeros(1, 1))
    torch.testing.assert_close(y.flatten(), torch.tensor([-1.0, 1.0]) * 0.01 / (1e-4 + 1e-3) ** 0.5)


def test_recorded_statistics_of_the_same_images_change_nothing():
    target = TargetNet(**SMALL)
    x = torch.randn(N, B * 3, 4, 4, generator=torch.Generator().manual_seed(0))
    affine = torch.full((B, 3), 2.0), torch.full((B, 3), 0.5)
    torch.testing.assert_close(target.normalise(x, *affine, target.statistics(x, B)), target.normalise(x, *affine), rtol=1e-5, atol=1e-6)


def test_absent_images_count_nothing_in_the_statistics():
    target = TargetNet(**SMALL)
    x = torch.randn(N, B * 3, 4, 4, generator=torch.Generator().manual_seed(0))
    present = torch.ones(B, N, dtype=torch.bool)
    present[1, 2:] = False
    x[2:, 3:6] = 1e4
    mean, variance = target.statistics(x, B, present)
    alone = target.statistics(x[:2, 3:6], 1)
    torch.testing.assert_close((mean[1], variance[1]), (alone[0][0], alone[1][0]))
    everyone = target.statistics(x, B)
    torch.testing.assert_close((mean[0], variance[2]), (everyone[0][0], everyone[1][2]))


@pytest.mark.parametrize(
    ("norm", "bn_stats", "depends"), [("batch", "query", True), ("batch", "support", False), ("group", "query", False)]
)
def test_an_answer_depends_on_other_queries_under_their_statistics_alone(norm, bn_stats, depends):
    target = TargetNet(norm=norm, **SMALL)
    tensors, x = made(target)
    alone, among = target.functional(x[:, :1], tensors, bn_stats), target.functional(x, tensors, bn_stats)[:, :1]
    assert torch.allclose(alone, among, rtol=0, atol=1e-10) != depends


def test_tasks_do_not_touch_each_other():
    target = TargetNet(**SMALL)
    tensors, x = made(target)
    before = target.functional(x, tensors)
    changed = {name: torch.cat([value[:1], 2 * value[1:]]) for name, value in tensors.items()}
    after = target.functional(torch.cat([x[:1], -x[1:]]), changed)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_nothing_to_ask_is_no_error():
    target = TargetNet(**SMALL)
    tensors, x = made(target)
    for bn_stats in ("query", "support"):
        assert target.functional(x[:, :0], tensors, bn_stats).shape == (B, 0, WAYS)


@pytest.mark.parametrize("bn_stats", ["query", "support"])
def test_a_single_query_on_one_pixel_needs_recorded_statistics(bn_stats):
    target = TargetNet(channels=3, image_size=4, n_layers=2)
    tensors, x = made(target, tasks=1)
    if bn_stats == "support":
        assert target.functional(x[:, :1], tensors, bn_stats).isfinite().all()
        return
    with pytest.raises(DataError, match=r"a single image on a 1 x 1 map.*bn_stats='support'"):
        target.functional(x[:, :1], tensors, bn_stats)
    assert target.functional(x[:, :2], tensors, bn_stats).isfinite().all()


# --- narrow numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_narrow_activations_are_normalised_in_float32(dtype, norm):
    target = TargetNet(channels=4, norm=norm)
    x = (300 + torch.randn(50, 4, 6, 6, generator=torch.Generator().manual_seed(0))).to(dtype)  # squares overflow float16
    y = target.normalise(x, torch.ones(1, 4), torch.zeros(1, 4))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, target.normalise(x.float(), torch.ones(1, 4), torch.zeros(1, 4)))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in target.statistics(x, 1))


def test_under_autocast_the_read_out_stays_in_float32():
    target = TargetNet(norm="group", **SMALL)
    tensors, x = made(target, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = target.embed(x, tensors)
        logits = target.functional(x, tensors)
        means, _ = class_means(embeddings, torch.arange(N).expand(B, N), N)
    assert logits.dtype == embeddings.dtype == means.dtype == torch.float32
    wanted = torch.baddbmm(tensors["logits.bias"][:, None], embeddings, tensors["logits.weight"].transpose(1, 2))
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(means, embeddings)


# --- slices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["output", "spatial"])
def test_cutting_undoes_assembling(allocation):
    kernel = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    slices = cut(kernel, allocation)
    assert slices.shape == slice_layout((4, 2, 3, 3), allocation)
    torch.testing.assert_close(assemble(slices[None], (4, 2, 3, 3), allocation)[0], kernel, rtol=0, atol=0)
    torch.testing.assert_close(cut(assemble(2 * slices[None], (4, 2, 3, 3), allocation)[0], allocation), 2 * slices, rtol=0, atol=0)


@pytest.mark.parametrize("allocation", ["output", "spatial"])
@pytest.mark.parametrize("j", [0, 3])
def test_a_slice_is_one_channel_or_one_position(allocation, j):
    kernel = (4, 2, 3, 3)
    slices = torch.randn(2, *slice_layout(kernel, allocation), generator=torch.Generator().manual_seed(0))
    moved = slices.clone()
    moved[:, j] += 1
    changed = assemble(moved, kernel, allocation) != assemble(slices, kernel, allocation)
    wanted = torch.zeros_like(changed)
    if allocation == "output":
        wanted[:, j] = True
    else:
        wanted[..., j // 3, j % 3] = True
    assert torch.equal(changed, wanted)


# --- class means -----------------------------------------------------------------------------------------------


def test_the_prototype_layer_is_the_squared_distance_up_to_a_constant_of_the_query():
    draw = torch.Generator().manual_seed(0)
    z, means = torch.randn(2, 6, 5, generator=draw, dtype=torch.float64), torch.randn(2, 4, 5, generator=draw, dtype=torch.float64)
    weight, bias = prototype_layer(means, torch.tensor(0.7, dtype=torch.float64))
    difference = z @ weight.transpose(1, 2) + bias[:, None] + 0.7 * squared_distances(z, means)
    torch.testing.assert_close(difference, 0.7 * z.square().sum(-1, keepdim=True).expand(-1, -1, 4))


def test_class_means_count_present_labelled_samples():
    embeddings = torch.tensor([[[1.0], [3.0], [10.0], [7.0], [100.0]]])
    labels, present = torch.tensor([[0, 0, 1, 5, 1]]), torch.tensor([[True, True, True, True, False]])
    means, counts = class_means(embeddings, labels, 3, present)
    assert means[0, :, 0].tolist() == [2, 10, 0]
    assert counts[0].tolist() == [2, 1, 0]


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["channels", "in_channels", "image_size", "n_layers"])
def test_numbers_start_at_one(name):
    with pytest.raises(SettingError, match=f"{name}=0 must be 1 or more"):
        TargetNet(**{name: 0})


def test_other_settings_that_make_no_net_are_refused():
    with pytest.raises(SettingError, match="norm='layer' is unknown; give 'batch' or 'group'"):
        TargetNet(norm="layer")
    with pytest.raises(SettingError, match="side 28 vanish after 5 halvings; give at most 4 layers"):
        TargetNet(n_layers=5)
    with pytest.raises(SettingError, match="one channel on a 1 x 1 map into a constant; give 2 channels"):
        TargetNet(channels=1, norm="group")
    assert TargetNet(channels=1).embedding_width == 1


@pytest.mark.parametrize("shape", [(N, 2, 9, 9), (B, N, 1, 9, 9), (B, N, 2, 8, 8), (B, N, 2, 9, 8)])
def test_images_of_another_form_are_never_resized(shape):
    target = TargetNet(**SMALL)
    tensors, _ = made(target, torch.float32)
    with pytest.raises(DataError, match=r"images must be \(tasks, images, 2, 9, 9\), got .* Nothing is resized"):
        target.functional(torch.zeros(shape), tensors)


def test_images_must_be_of_as_many_tasks_and_of_the_dtype_of_the_weights():
    target = TargetNet(**SMALL)
    tensors, x = made(target, torch.float32)
    with pytest.raises(DataError, match="images of 1 tasks and weights of 3; expand the images"):
        target.functional(x[:1], tensors)
    with pytest.raises(DataError, match=r"images are torch.bfloat16, weights torch.float32; convert the images with x.to"):
        target.functional(x.bfloat16(), tensors)
