"""HyperTransformer: which answers depend on each other, odd support sets, narrow numbers, and every refusal."""

import warnings

import pytest
import torch

from remanence.errors import DataError, SettingError
from remanence.generated import UNLABELED, Episode
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng

TARGET = TargetNet(channels=4, image_size=8, n_layers=3)
GROUP = TargetNet(channels=4, image_size=8, n_layers=3, norm="group")


def made(target=TARGET, **settings):
    with keyed_rng("model"):
        return HyperTransformer(target, **({"max_ways": 5, "width": 16, "heads": 2} | settings))


def images(*shape, seed=0):
    return torch.rand(*shape, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(tasks=2, ways=3, shots=1):
    return torch.arange(ways).repeat_interleave(shots).repeat(tasks, 1)


def episode(queries=4, **settings):
    return Episode(images(2, 3), labels(), images(2, queries, seed=1), **settings)


# --- which answers depend on each other ------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "bn_stats", "depends"), [(TARGET, "query", True), (TARGET, "support", False), (GROUP, "query", False)])
def test_a_querys_answer_depends_on_other_queries_under_query_statistics_alone(target, bn_stats, depends):
    model, given = made(target, bn_stats=bn_stats), episode()
    fewer = Episode(given.support_x, given.support_y, given.query_x[:, :2])
    assert torch.allclose(model(given)[:, :2], model(fewer), rtol=0, atol=1e-5) != depends


@pytest.mark.parametrize("bn_stats", ["query", "support"])
def test_generate_and_forward_agree(bn_stats):
    model, given = made(bn_stats=bn_stats), episode()
    torch.testing.assert_close(model.generate(given.support_x, given.support_y).logits(given.query_x, bn_stats), model(given))


def test_one_query_on_one_pixel_needs_the_supports_statistics():
    with pytest.raises(DataError, match=r"a single image on a 1 x 1 map.*bn_stats='support'"):
        made()(episode(queries=1))
    assert made(bn_stats="support")(episode(queries=1)).isfinite().all()
    assert made(GROUP)(episode(queries=1)).isfinite().all()
    assert made(TargetNet(channels=4, image_size=8, n_layers=2))(episode(queries=1)).isfinite().all()


def test_no_query_is_legal():
    assert made()(episode(queries=0)).shape == (2, 0, 3)


# --- odd support sets ------------------------------------------------------------------------------------------


def test_one_against_five_shots_are_fine_and_a_prototype_is_a_mean():
    model, y = made(generate="logits", head="prototype"), torch.tensor([[0, 1, 1, 1, 1, 1]])
    weights = model.generate(images(1, 6), y)
    z = TARGET.embed(images(1, 6), weights.tensors, "support")
    means = torch.stack([z[:, 0], z[:, 1:].mean(1)], 1)
    torch.testing.assert_close(weights.tensors["logits.weight"], 2 * model.log_scale.exp() * means)


def test_one_support_image_on_one_pixel_is_finite_and_warned_of_once():
    model = made()
    with pytest.warns(UserWarning, match="one support image and the last map is 1 x 1"):
        weights = model.generate(images(1, 1), torch.tensor([[0]]))
    assert all(value.isfinite().all() for value in weights.tensors.values())
    assert weights.logits(images(1, 3)).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(images(1, 1), torch.tensor([[0]]))
        made(GROUP).generate(images(1, 1), torch.tensor([[0]]))
    mask = torch.tensor([[True, False]])
    with pytest.warns(UserWarning, match="Give more images, or use norm='group'"):
        made().generate(images(1, 2), torch.tensor([[0, 0]]), mask)


def test_a_class_may_go_without_shots_only_if_that_is_said():
    model, y = made(), torch.tensor([[0, 2, UNLABELED]])
    with pytest.raises(DataError, match="task 0 has no labelled sample of class 1"):
        model.generate(images(1, 3), y)
    weights = model.generate(images(1, 3), y, allow_empty=True)
    assert weights.tensors["logits.bias"].isneginf().tolist() == [[False, True, False]]
    assert weights.logits(images(1, 2)).softmax(-1)[..., 1].max() == 0
    given = Episode(images(1, 3), y, images(1, 2), allow_empty=True)
    assert model.episode_variation(given).keys() == set(TARGET.conv_names)


def test_class_names_stay_with_the_weights():
    assert made().generate(images(1, 3), labels(1), class_names=[["a", "b", "c"]]).class_names == (("a", "b", "c"),)


# --- narrow numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_another_dtype_than_the_model_are_refused(dtype):
    given = episode()
    other = Episode(given.support_x.to(dtype), given.support_y, given.query_x.to(dtype))
    message = rf"images are {dtype}, the model's parameters torch.float32; convert the images with x.to\(torch.float32\)"
    with pytest.raises(DataError, match=message):
        made().generate(other.support_x, other.support_y)
    with pytest.raises(DataError, match=message):
        made()(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_model_is_refused(dtype):
    given = episode()
    with pytest.raises(DataError, match=rf"parameters are {dtype}, too narrow for its norms; use model.float\(\), and torch.autocast"):
        made().to(dtype).generate(given.support_x.to(dtype), given.support_y)


@pytest.mark.parametrize("target", [TARGET, GROUP])
@pytest.mark.parametrize("head", ["proto+delta", "generated"])
def test_under_autocast_statistics_class_means_and_answers_are_float32(target, head):
    model, given = made(target, head=head), episode()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        tensors, logits = model.generate(given.support_x, given.support_y).tensors, model(given)
    assert logits.dtype == torch.float32
    assert {value.dtype for name, value in tensors.items() if not name.startswith("logits") or head != "generated"} == {torch.float32}
    torch.testing.assert_close(logits.softmax(-1), model(given).softmax(-1), rtol=0, atol=0.1)


# --- refusals --------------------------------------------------------------------------------------------------


def test_images_are_never_resized():
    x = torch.rand(2, 3, 1, 9, 9)  # halves to the same last map as 8 x 8
    for call in (lambda: made().generate(x, labels()), lambda: made()(Episode(x, labels(), x))):
        with pytest.raises(DataError, match=r"images must be \(tasks, images, 1, 8, 8\), got \(2, 3, 1, 9, 9\). Nothing is resized"):
            call()
    with pytest.raises(DataError, match=r"images must be .* got \(2, 3, 3, 8, 8\)"):
        made().generate(torch.rand(2, 3, 3, 8, 8), labels())
    with pytest.raises(DataError, match=r"images must be .* got \(3, 1, 8, 8\)"):
        made().generate(images(3), labels(1)[0])


def test_broken_pixels_and_labels_are_refused():
    x = images(2, 3)
    with pytest.raises(DataError, match=r"support_x is torch.uint8, floating point is needed"):
        made().generate((255 * x).byte(), labels())
    x[1, 2, 0, 4, 4] = torch.nan
    with pytest.raises(DataError, match="support sample 2 of task 1 has a NaN"):
        made().generate(x, labels())
    with pytest.raises(DataError, match="support_y of task 0, sample 0 is -2"):
        made().generate(images(2, 3), labels() - 2)
    with pytest.raises(DataError, match=r"support_y must be .* torch.int64, got .* torch.float32"):
        made().generate(images(2, 3), labels().float())
    with pytest.raises(DataError, match="task 0 has no labelled sample in its support"):
        made().generate(images(2, 3), torch.full((2, 3), UNLABELED))


@pytest.mark.parametrize("head", ["proto+delta", "prototype"])
def test_more_ways_than_it_knows_are_refused(head):
    given = Episode(images(1, 6), torch.arange(6)[None], images(1, 2))
    for call in (lambda model: model.generate(given.support_x, given.support_y), lambda model: model(given)):
        with pytest.raises(DataError, match=r"a task of 6 ways, .* trained for at most 5; .*label_codes='random'"):
            call(made(head=head))


@pytest.mark.parametrize(("name", "seen"), [("write", "conv2"), ("logits", "logits.(weight|bias)")])
def test_broken_weights_name_their_layer_and_are_not_returned(name, seen):
    model, given = made(), episode()
    with torch.no_grad():
        (model.base["conv2"] if name == "write" else model.log_scale).fill_(torch.nan)
    with pytest.raises(DataError, match=f"the weights written for {seen}.* are not finite; look at the images' range"):
        model.generate(given.support_x, given.support_y)


def test_a_broken_bias_is_told_from_a_slot_without_samples():
    model, given = made(head="generated"), episode()
    with torch.no_grad():
        model.generators["logits"].write.bias[-1] = torch.nan
    with pytest.raises(DataError, match=r"the weights written for logits\.bias are not finite"):
        model.generate(given.support_x, given.support_y)


def test_settings_must_be_known_and_agree():
    for name in ("head", "allocation", "preset", "label_codes", "bn_stats"):
        with pytest.raises(SettingError, match=f"{name}='other' is unknown; give one of"):
            HyperTransformer(TARGET, **{name: "other"})
    for name in ("width", "depth", "heads", "code_width", "shared_features"):
        with pytest.raises(SettingError, match=f"{name}=0 must be 1 or more"):
            HyperTransformer(TARGET, **{name: 0})
    with pytest.raises(SettingError, match="heads=3 must divide width=64"):
        HyperTransformer(TARGET, heads=3)
    with pytest.raises(SettingError, match="max_ways=1; a task has two classes or more"):
        HyperTransformer(TARGET, max_ways=1)
    with pytest.raises(SettingError, match="9 ways need as many orthonormal codes, and code_width=8 holds fewer"):
        HyperTransformer(TARGET, max_ways=9, code_width=8, label_codes="random")
    with pytest.raises(SettingError, match="generate_norm needs allocation='output'"):
        HyperTransformer(TARGET, generate_norm=True, allocation="spatial")
    with pytest.raises(SettingError, match=r"generate names \['conv4'\]; this net has conv1, conv2, conv3, or say 'all' or 'logits'"):
        HyperTransformer(TARGET, generate=("conv1", "conv4"))
