"""HyperTransformer: symmetries of the written weights, what is written and what is shared, heads, gradients.

Axes: B tasks, S support samples, Q queries, n ways, D embedding width.
"""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from remanence.generated import UNLABELED, Episode
from remanence.generated import hypertransformer as module
from remanence.generated.heads import class_means, squared_distances
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.meta_trainer import MetaTrainer, episode_loss
from remanence.generated.target import TargetNet
from remanence.keys import generator, keyed_rng

TARGET = TargetNet(channels=4, image_size=8, n_layers=3)
GROUP = TargetNet(channels=4, image_size=8, n_layers=3, norm="group")
HEADS = ("proto+delta", "generated", "prototype")


def made(target=TARGET, seed=0, **settings):
    """A model whose support set moves the weights far, and whose written head is not zero."""
    with keyed_rng("model", seed):
        model = HyperTransformer(target, **({"max_ways": 5, "width": 16, "heads": 2} | settings))
        for name, part in model.generators.items():
            if model.preset is None:
                torch.nn.init.normal_(part.write.weight, std=(0.05 if name == "logits" else 0.2) / part.scale)
    return model


def episode(ways=3, shots=2, tasks=2, unlabeled=0, queries=4, seed=0, dtype=torch.float32):
    """Images around one random picture a class, class by class, unlabelled ones last."""
    draw = torch.Generator().manual_seed(seed)
    pictures = torch.randn(tasks, ways, 1, 8, 8, generator=draw)

    def near(n):
        slots = torch.arange(ways).repeat_interleave(n)
        return (pictures[:, slots] + 0.5 * torch.randn(tasks, ways * n, 1, 8, 8, generator=draw)).to(dtype), slots.repeat(tasks, 1)

    (x, y), (more, _), (query_x, query_y) = near(shots), near(unlabeled), near(queries)
    return Episode(torch.cat([x, more], 1), torch.cat([y, torch.full(more.shape[:2], UNLABELED)], 1), query_x, query_y)


def written(model, given, rows=slice(None), **also):
    """All tensors of the tasks `rows`, without gradients."""
    mask = None if given.support_mask is None else given.support_mask[rows]
    with torch.no_grad():
        return model.generate(given.support_x[rows], given.support_y[rows], mask, **also).tensors


def assert_same(found, wanted, atol):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_differ(found, wanted, atol):
    assert max((found[name] - wanted[name]).abs().max() for name in wanted if name.endswith("weight")) > atol


# --- symmetries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [TARGET, GROUP])
@pytest.mark.parametrize("settings", [{}, {"head": "generated", "label_codes": "random"}, {"allocation": "spatial"}, {"preset": "paper"}])
def test_the_order_of_the_support_leaves_the_weights(target, settings):
    model, given = made(target, **settings).double(), episode(unlabeled=1, dtype=torch.float64)
    order = torch.randperm(given.support_x.shape[1], generator=torch.Generator().manual_seed(1))
    shuffled = Episode(given.support_x[:, order], given.support_y[:, order], given.query_x)
    assert_same(written(model, shuffled), written(model, given), 1e-6)


@pytest.mark.parametrize("target", [TARGET, GROUP])
@pytest.mark.parametrize("settings", [{}, {"head": "generated", "label_codes": "random"}, {"preset": "paper"}])
def test_an_absent_sample_is_one_that_was_never_there(target, settings):
    model, given = made(target, **settings).double(), episode(shots=3, unlabeled=1, dtype=torch.float64)
    mask = torch.ones(given.support_y.shape, dtype=torch.bool)
    mask[0, [1, 5, 10]] = False
    x = given.support_x.clone()
    x[~mask] = 1e3
    masked = Episode(x, given.support_y, given.query_x, support_mask=mask)
    removed = Episode(x[:1, mask[0]], given.support_y[:1, mask[0]], given.query_x[:1])
    assert_same(written(model, masked, slice(1)), written(model, removed), 1e-9)
    assert_same(written(model, masked, slice(1, 2)), written(model, given, slice(1, 2)), 1e-9)
    torch.testing.assert_close(model(masked)[:1], model(removed), rtol=0, atol=1e-9)


@pytest.mark.parametrize("target", [TARGET, GROUP])
def test_padding_may_hold_anything_finite(target):
    model, given = made(target), episode(shots=3)
    mask = torch.ones(given.support_y.shape, dtype=torch.bool)
    mask[0, [1, 5]] = False
    black, huge = (torch.where(mask[..., None, None, None], given.support_x, fill) for fill in (0.0, 3e38))
    results = []
    for x in (black, huge):
        model.zero_grad()
        logits = model(Episode(x, given.support_y, given.query_x, support_mask=mask))
        logits.square().sum().backward()
        results.append([logits, *(value.grad for value in model.parameters() if value.grad is not None)])
        assert all(value.isfinite().all() for value in results[-1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


BATCHED = [{"head": head, "label_codes": codes} for head in HEADS for codes in ("learned", "random")]


@pytest.mark.parametrize("settings", [*BATCHED, {"generate": "logits"}, {"generate_norm": True}, {"preset": "paper"}])
def test_tasks_of_a_batch_are_written_as_if_alone_also_in_chunks(settings, monkeypatch):
    model, given = made(**settings).double(), episode(tasks=5, unlabeled=1, dtype=torch.float64)
    alone = [written(model, given, slice(b, b + 1)) for b in range(5)]
    alone = {name: torch.cat([one[name] for one in alone]) for name in alone[0]}
    assert_same(written(model, given), alone, 1e-9)
    monkeypatch.setattr(module, "_IMAGES_AT_ONCE", 2 * given.support_x.shape[1])  # two tasks at a time, then one
    chunks = []
    monkeypatch.setattr(model, "_write", lambda *rows: chunks.append(len(rows[0])) or HyperTransformer._write(model, *rows))
    assert_same(written(model, given), alone, 1e-9)
    assert chunks == [2, 2, 1]


@pytest.mark.parametrize("head", HEADS)
def test_a_task_does_not_depend_on_how_many_ways_its_neighbours_have(head):
    model = made(head=head).double()
    narrow = episode(ways=2, shots=5, tasks=1, queries=5, dtype=torch.float64)
    wide = episode(ways=5, shots=2, tasks=1, queries=2, seed=1, dtype=torch.float64)
    parts = ((getattr(narrow, name), getattr(wide, name)) for name in ("support_x", "support_y", "query_x", "query_y"))
    both = Episode(*map(torch.cat, parts))
    weights = model.generate(both.support_x, both.support_y)
    assert weights.ways.tolist() == [2, 5]
    cut = {name: value[:1, :2] if name.startswith("logits") else value[:1] for name, value in weights.tensors.items()}
    assert_same(cut, written(model, narrow), 1e-9)
    logits = model(both)
    torch.testing.assert_close(logits[:1, :, :2], model(narrow), rtol=0, atol=1e-9)
    assert logits[0, :, 2:].isneginf().all()
    assert logits[1].isfinite().all()
    episode_loss(logits, both).backward()
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_a_copied_support_changes_weights_under_softmax_and_leaves_class_means():
    model, given = made(GROUP, generate="logits"), episode()
    twice = Episode(given.support_x.repeat(1, 2, 1, 1, 1), given.support_y.repeat(1, 2), given.query_x)
    assert_differ(written(model, twice), written(model, given), 1e-4)  # weight tokens are keys as well, and lose their share
    plain = made(GROUP, generate="logits", head="prototype")
    assert_same(written(plain, twice), written(plain, given), 1e-6)


# --- labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_renaming_classes_and_their_codes_renames_the_answers_exactly(head, monkeypatch):
    model, given = made(head=head, label_codes="random").double(), episode(ways=4, unlabeled=1, dtype=torch.float64)
    names = torch.tensor([2, 0, 3, 1])  # class c stands in slot names[c]
    y = torch.where(given.support_y == UNLABELED, UNLABELED, names[given.support_y.clamp(min=0)])
    codes = model._codes(2, generator("codes"))
    moved = codes.clone()
    moved[:, names] = codes[:, :4]
    monkeypatch.setattr(model, "_codes", lambda *_: codes)
    before = model(given)
    monkeypatch.setattr(model, "_codes", lambda *_: moved)
    after = model(Episode(given.support_x, y, given.query_x))
    torch.testing.assert_close(after[..., names], before, rtol=0, atol=1e-10)


def test_with_drawn_codes_renaming_classes_changes_nothing_on_average():
    model, given = made(head="generated", label_codes="random"), episode(tasks=1, queries=1)
    names, n = torch.tensor([1, 2, 0]), 400
    logits = []
    for which, y in enumerate((given.support_y, names[given.support_y])):
        many = Episode(given.support_x.expand(n, -1, -1, -1, -1), y.expand(n, -1), given.query_x.expand(n, -1, -1, -1, -1))
        with torch.no_grad():
            logits.append(model(many, generator("draw", which)).log_softmax(-1))
    first, second = logits[0], logits[1][..., names]
    error = ((first.var(0) + second.var(0)) / n).sqrt()
    assert first.std(0).min() > 1e-3
    assert ((first.mean(0) - second.mean(0)).abs() < 4 * error).all()


def test_random_codes_are_orthonormal_as_long_as_learned_ones_and_the_same_unless_drawn():
    model = made(label_codes="random", code_width=8)
    codes = model._codes(3, generator("a"))
    assert codes.shape == (3, 5, 8)
    torch.testing.assert_close(codes @ codes.transpose(1, 2), 8 * torch.eye(5).expand(3, -1, -1), rtol=0, atol=1e-4)
    assert not torch.allclose(codes[0], codes[1])
    fixed = model._codes(3, None)
    assert torch.equal(fixed[0], fixed[2])
    assert torch.equal(fixed, model._codes(3, None))


def test_learned_codes_tell_slots_apart():
    model, given = made(), episode()
    names = torch.tensor([1, 2, 0])
    assert_differ(written(model, Episode(given.support_x, names[given.support_y], given.query_x)), written(model, given), 1e-3)


def test_an_unlabelled_sample_acts_through_its_own_token_alone():
    given = episode(unlabeled=1)
    bare = Episode(given.support_x[:, :6], given.support_y[:, :6], given.query_x)
    plain = made(GROUP, generate="logits", head="prototype")  # reads no token
    assert_same(written(plain, given), written(plain, bare), 1e-6)
    model = made(GROUP, generate="logits")  # class means plus what tokens say
    assert_differ(written(model, given), written(model, bare), 1e-4)
    for part in model.generators.values():
        torch.nn.init.zeros_(part.write.weight)
    assert_same(written(model, given), written(model, bare), 1e-6)


def test_an_unlabelled_sample_counts_in_batch_statistics_and_in_no_class_mean():
    given = episode(unlabeled=1)
    model = made(generate="logits", head="prototype")
    with_it = written(model, given)
    without = written(model, Episode(given.support_x[:, :6], given.support_y[:, :6], given.query_x))
    assert not torch.allclose(with_it["conv1.mean"], without["conv1.mean"])
    z = model.target.embed(given.support_x, {"logits.bias": None} | with_it, "support")
    means = torch.stack([z[:, 2 * c : 2 * c + 2].mean(1) for c in range(3)], 1)
    torch.testing.assert_close(with_it["logits.weight"], 2 * model.log_scale.exp() * means, rtol=0, atol=1e-5)


# --- what is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allocation", "n_slices"), [("output", 4), ("spatial", 9)])
@pytest.mark.parametrize("name", ["conv1", "conv2"])
def test_slice_j_of_the_base_is_channel_or_position_j_of_the_kernel(allocation, n_slices, name):
    model, given = made(allocation=allocation), episode()
    assert len(model.base[name]) == n_slices
    before = written(model, given)[f"{name}.weight"]
    with torch.no_grad():
        model.base[name][2] += 1
    has_moved = written(model, given)[f"{name}.weight"] != before
    wanted = torch.zeros_like(has_moved)
    (wanted[:, 2] if allocation == "output" else wanted[..., 0, 2]).fill_(True)
    assert torch.equal(has_moved, wanted)


@pytest.mark.parametrize(
    ("generate", "names"),
    [("all", ("conv1", "conv2", "conv3")), ("logits", ()), (("conv3", "conv2"), ("conv2", "conv3")), ("conv1", ("conv1",))],
)
def test_named_layers_are_written_and_the_others_shared(generate, names):
    model, given = made(generate=generate), episode(tasks=3)
    assert model.written == names
    assert set(model.kernels) | set(names) == set(TARGET.conv_names)
    tensors = written(model, given)
    for name in TARGET.conv_names:
        assert torch.equal(tensors[f"{name}.weight"][0], tensors[f"{name}.weight"][1]) == (name not in names)
    assert model.episode_variation(given).keys() == set(names)
    assert all(value > 0 for value in model.episode_variation(given).values())


def test_shared_kernels_cost_no_task_axis():
    model, given = made(generate="logits"), episode(tasks=3)
    kernels = [value for name, value in written(model, given).items() if name.startswith("conv") and name.endswith("weight")]
    assert all(value.dim() == 4 or value.stride(0) == 0 for value in kernels)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", lambda *given, conv=F.conv2d, **more: seen.append(more.get("groups", 1)) or conv(*given, **more))
        model(given)
    assert set(seen) == {1}  # one ordinary convolution for all tasks


def test_written_norms_start_from_one_and_zero():
    model, given = made(generate_norm=True), episode()
    tensors = written(model, given)
    assert model.base["conv1"].shape == (4, 9 + 2)
    assert tensors["conv1.gamma"].std(0).min() > 0
    for part in model.generators.values():
        torch.nn.init.zeros_(part.write.weight)
    tensors = written(model, given)
    assert all(torch.equal(tensors[f"{name}.gamma"], torch.ones(2, 4)) for name in TARGET.conv_names)
    assert all(torch.equal(tensors[f"{name}.beta"], torch.zeros(2, 4)) for name in TARGET.conv_names)
    with torch.no_grad():
        model.base["conv1"][2, -2:] += torch.tensor([0.5, -1.0])
    tensors = written(model, given)
    assert tensors["conv1.gamma"][0].tolist() == [1, 1, 1.5, 1]
    assert tensors["conv1.beta"][1].tolist() == [0, 0, -1, 0]


def test_a_layer_reads_the_activations_under_the_layers_before_it():
    model, given = made(), episode()
    before = written(model, given)
    with torch.no_grad():
        model.base["conv1"][0] *= -1
    after = written(model, given)
    assert (after["conv2.weight"] - before["conv2.weight"]).abs().max() > 1e-4
    with torch.no_grad():
        model.base["conv3"][0] *= -1
    again = written(model, given)
    assert torch.equal(again["conv2.weight"], after["conv2.weight"])


# --- heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn_stats", ["query", "support"])
def test_the_default_starts_as_a_prototypical_network(bn_stats):
    with keyed_rng("fresh"):
        model = HyperTransformer(TARGET, max_ways=5, bn_stats=bn_stats).double()
    given = episode(dtype=torch.float64)
    weights = model.generate(given.support_x, given.support_y)
    means, _ = class_means(TARGET.embed(given.support_x, weights.tensors, "support"), given.support_y, 3)
    distances = squared_distances(TARGET.embed(given.query_x, weights.tensors, bn_stats), means)
    difference = model(given) + model.log_scale.exp() * distances
    torch.testing.assert_close(difference, difference.mean(-1, keepdim=True).expand_as(difference), rtol=0, atol=1e-10)
    torch.testing.assert_close(model(given).softmax(-1), model.answers(given)[1].softmax(-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("codes", ["learned", "random"])
@pytest.mark.parametrize("generate", ["all", ("conv2",)])
def test_the_gradient_reaches_every_parameter(head, codes, generate):
    model, given = made(head=head, label_codes=codes, generate=generate).double(), episode(ways=5, unlabeled=2, dtype=torch.float64)
    episode_loss(model(given, generator("draw")), given).backward()
    still = {name for name, value in model.named_parameters() if value.numel() and (value.grad is None or value.grad.abs().max() < 1e-12)}
    # A softmax does not see what all classes share: what the last biases add to every slot; the query's own length, through which
    # alone a shift of all embeddings would act. And a written head needs the scale of distances only while it warms up.
    biases = {"generators.logits.write.bias", "generators.logits.norm.bias"}
    assert still == {"prototype": {"beta.conv3"}, "generated": {"log_scale"} | biases, "proto+delta": biases}[head]


def test_the_gradient_reaches_every_parameter_of_the_papers_form():
    model, given = made(preset="paper").double(), episode(ways=5, unlabeled=2, dtype=torch.float64)
    episode_loss(model(given), given).backward()
    still = {name for name, value in model.named_parameters() if value.grad is None or value.grad.abs().max() < 1e-12}
    assert still == {"log_scale", "generators.logits.blocks.2.inner_norm.bias"}


def test_the_written_head_of_the_default_moves_from_its_first_step():
    with keyed_rng("fresh"):
        model = HyperTransformer(TARGET, max_ways=5)
    given = episode()
    episode_loss(model(given), given).backward()
    assert model.generators["logits"].write.weight.abs().max() == 0
    assert model.generators["logits"].write.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("settings", "tolerance"), [({}, 1.5), ({"target": TargetNet(norm="group")}, 0.5), ({"head": "generated"}, 0.35)])
def test_the_first_loss_is_near_that_of_guessing(settings, tolerance):
    losses = []
    for seed in range(3):
        with keyed_rng("fresh", seed):
            model = HyperTransformer(**({"target": TargetNet(), "max_ways": 5} | settings))
        draw = torch.Generator().manual_seed(seed)
        pictures = torch.rand(4, 5, 1, 28, 28, generator=draw)
        near = pictures.repeat_interleave(5, 1) + 0.3 * torch.randn(4, 25, 1, 28, 28, generator=draw)
        given = Episode(pictures, torch.arange(5).expand(4, 5), near, torch.arange(5).repeat_interleave(5).expand(4, 25))
        with torch.no_grad():
            losses.append(episode_loss(model(given), given).item())
    assert sum(losses) / 3 < math.log(5) + tolerance


# --- determinism -----------------------------------------------------------------------------------------------


def test_seeds_reproduce_bitwise_and_nothing_is_touched():
    given = episode()
    before, state = copy.deepcopy((given.support_x, given.support_y)), torch.get_rng_state()
    runs = []
    for _ in range(2):
        model = made(label_codes="random")
        trainer = MetaTrainer(model.parameters(), 5)
        losses = [trainer.update(episode_loss(model(given, generator("draw", k)), given)) for k in range(3)]
        runs.append([*losses, *(value.detach() for value in model.parameters()), *written(model, given).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(before[0], given.support_x)
    assert torch.equal(before[1], given.support_y)
