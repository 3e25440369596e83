"""The rivals of the HyperTransformer: each against a plain form of itself, and what each is there to show."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from benchmark_files import load
from torch.nn import functional as F

from remanence.errors import DataError, SettingError
from remanence.generated.continual import ContinualHyperTransformer, continual_loss, continual_targets
from remanence.generated.episode import UNLABELED, Episode
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.meta_trainer import MetaTrainer, episode_loss
from remanence.generated.sampling import EpisodeSampler, SequenceSampler
from remanence.generated.target import TargetNet
from remanence.keys import generator, keyed_rng
from remanence.streams import digits

FOLDER = Path(__file__).parents[2] / "benchmarks"
PARTS = ("baselines", "maml", "finetuning")
TARGET = TargetNet(channels=4, image_size=8, n_layers=2)
GROUPED = TargetNet(channels=4, image_size=8, n_layers=2, norm="group")


@pytest.fixture(scope="module")
def parts():
    """The three files, in the order of their imports."""
    return {part: load(f"hypertransformer_{part}") for part in PARTS}


@pytest.fixture
def baselines(parts):
    return parts["baselines"]


@pytest.fixture
def maml(parts):
    return parts["maml"]


@pytest.fixture
def finetuning(parts):
    return parts["finetuning"]


def made(kind, *args, seed=0, **settings):
    with keyed_rng(seed, "made"):
        return kind(*args, **settings)


@cache
def sampler(kind, **settings):
    return kind(digits(), queries=6, **settings)


def sampled(ways=3, shots=1, tasks=3, step=0, **settings):
    return sampler(EpisodeSampler, ways=ways, shots=shots, tasks=tasks, **settings).sample(step)


def stream(n_tasks=3, ways=2, sequences=4, step=0, shots=1):
    return sampler(SequenceSampler, n_tasks=n_tasks, ways=ways, shots=shots, sequences=sequences).sample(step)


def shaken(model, spread=0.2):
    """The same with every parameter moved, so that none is 0 or 1 by chance of the initialisation."""
    draw = generator(0, "shaken")
    with torch.no_grad():
        for value in model.parameters():
            value.add_(spread * torch.randn(value.shape, generator=draw).to(value))
    return model


# --- ProtoNet --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn_stats", ["query", "support"])
@pytest.mark.parametrize("target", [TARGET, GROUPED], ids=["batch", "group"])
def test_a_protonet_is_the_hypertransformer_that_writes_only_class_means(baselines, target, bn_stats):
    written = shaken(made(HyperTransformer, target, generate="logits", head="prototype", max_ways=4, bn_stats=bn_stats))
    rival = baselines.ProtoNet(target, bn_stats)
    known = {name: value for name, value in written.state_dict().items() if name in rival.state_dict()}
    rival.load_state_dict(known)  # strict: nothing of the rival is left as it was
    episode = sampled(shots=(1, 3), ways=4)
    torch.testing.assert_close(rival(episode), written(episode), rtol=1e-5, atol=1e-5)


def test_a_protonet_asks_nothing_of_masked_and_unlabelled_samples(baselines):
    rival = made(baselines.ProtoNet, TARGET, "support")
    episode = sampled(shots=2)
    y, mask = episode.support_y.clone(), torch.ones_like(episode.support_y, dtype=torch.bool)
    y[:, 1::2], mask[:, 1::2] = UNLABELED, False
    short = Episode(episode.support_x[:, ::2], y[:, ::2], episode.query_x, episode.query_y)
    torch.testing.assert_close(rival(replace(episode, support_y=y, support_mask=mask)), rival(short), rtol=1e-4, atol=1e-5)


def test_statistics_of_the_support_free_an_answer_from_the_other_queries(baselines):
    episode = sampled()
    first = replace(episode, query_x=episode.query_x[:, :1], query_y=episode.query_y[:, :1])
    for bn_stats, is_same in (("support", True), ("query", False)):
        rival = made(baselines.ProtoNet, TARGET, bn_stats)
        assert torch.allclose(rival(first), rival(episode)[:, :1], atol=1e-5) == is_same


# --- MAML ------------------------------------------------------------------------------------------------------


def plain_maml(rival, x, y, second_order):
    """One task: ordinary convolutions of the definition, one step after the other. x (S, C, H, W)."""
    names = rival.target.conv_names
    tensors = []
    for name in names:
        tensors += [rival.kernels[name], rival.gamma[name], rival.beta[name]]
    tensors += [rival.weight, rival.bias]
    for rates in rival.rates:
        gradients = torch.autograd.grad(F.cross_entropy(plain_logits(tensors, x), y), tensors, create_graph=second_order)
        tensors = [value - rate * step for value, rate, step in zip(tensors, rates, gradients, strict=True)]
    return tensors


def plain_logits(tensors, x):
    for kernel, gamma, beta in zip(tensors[0:-2:3], tensors[1:-2:3], tensors[2:-2:3], strict=True):
        x = F.max_pool2d(F.conv2d(x, kernel, padding=1).relu(), 2)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-3).sqrt() * gamma[:, None, None] + beta[:, None, None]
    return F.linear(x.flatten(1), tensors[-2], tensors[-1])


@pytest.mark.parametrize("second_order", [True, False])
def test_batched_maml_is_maml_task_by_task_in_value_and_gradient(maml, second_order):
    rival = shaken(made(maml.MAML, TARGET, 3, steps=2, second_order=second_order, inner_lr=0.3).double())
    episode = sampled(shots=2)
    x, q = episode.support_x.double(), episode.query_x.double()
    batched = rival(replace(episode, support_x=x, query_x=q))
    alone = torch.stack([
        plain_logits(plain_maml(rival, x[task], episode.support_y[task], second_order), q[task]) for task in range(len(x))
    ])  # fmt: skip
    torch.testing.assert_close(batched, alone, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(episode_loss(logits, episode), list(rival.parameters())) for logits in (batched, alone)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert gradients[0][-1].abs().sum() > 0


def test_the_orders_of_maml_agree_in_value_and_differ_in_gradient(maml):
    rival, episode = shaken(made(maml.MAML, TARGET, 3, steps=2)), sampled()
    found = []
    for second_order in (True, False):
        rival.second_order = second_order
        loss = episode_loss(rival(episode), episode)
        found.append((loss, torch.autograd.grad(loss, rival.kernels["conv1"])[0]))
    assert torch.allclose(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-2)


def test_maml_adapts_where_gradients_are_switched_off(maml):
    rival, episode = shaken(made(maml.MAML, TARGET, 3)), sampled()
    with torch.no_grad():
        tensors = rival.adapt(episode.support_x, episode.support_y)
        logits = rival.target.functional(episode.query_x, tensors)
    assert not any(value.requires_grad for value in tensors.values())
    assert {len(value) for value in tensors.values()} == {len(episode)}
    torch.testing.assert_close(logits, rival(episode), rtol=1e-4, atol=1e-5)
    assert rival.adapt(episode.support_x, episode.support_y)["conv1.weight"].requires_grad


def test_maml_records_the_statistics_of_the_adapted_net(maml, baselines):
    rival, episode = shaken(made(maml.MAML, TARGET, 3, bn_stats="support")), sampled()
    with torch.no_grad():
        tensors = rival.adapt(episode.support_x, episode.support_y)
        by_themselves = rival.target.embed(episode.support_x, tensors, "query")
        by_the_record = rival.target.embed(episode.support_x, tensors, "support")
    torch.testing.assert_close(by_themselves, by_the_record, rtol=1e-4, atol=1e-4)
    rival.bn_stats = "query"
    assert "conv1.mean" not in rival.adapt(episode.support_x, episode.support_y)


@pytest.mark.parametrize("kind", ["ProtoNet", "MAML"])
def test_a_rival_learns_from_episodes(parts, kind):
    rival = made(parts["maml"].MAML, TARGET, 3, steps=2, inner_lr=0.1) if kind == "MAML" else made(parts["baselines"].ProtoNet, TARGET)
    held_out = sampled(tasks=40, step=10_000)
    with torch.no_grad():
        before = parts["baselines"].accuracy(rival(held_out), held_out).mean()
    trainer = MetaTrainer(rival.parameters(), 50, lr=2e-2)
    for step in range(50):
        episode = sampled(step=step, tasks=4)
        trainer.update(episode_loss(rival(episode), episode))
    with torch.no_grad():
        after = parts["baselines"].accuracy(rival(held_out), held_out).mean()
    assert after > before + 0.05


def test_maml_says_what_it_cannot_take(maml):
    with pytest.raises(SettingError, match=r"steps=0, ways=3, inner_lr=0\.1; give a step"):
        maml.MAML(TARGET, 3, steps=0)
    rival, episode = made(maml.MAML, TARGET, 3), sampled(shots=2)
    unlabeled = episode.support_y.clone()
    unlabeled[0, 0] = UNLABELED
    with pytest.raises(DataError, match=r"MAML: labels -1\.\.2; every support sample needs one of the slots 0\.\.2"):
        rival(replace(episode, support_y=unlabeled))
    mask = torch.ones_like(unlabeled, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(DataError, match="masked support samples"):
        rival(replace(episode, support_mask=mask))
    with pytest.raises(SettingError, match="has 3 ways, not 5"):
        rival.start(2, 5)


# --- pixels ----------------------------------------------------------------------------------------------------


def test_pixel_neighbours_answer_with_the_class_of_the_nearest_labelled_image(baselines):
    episode = sampled(shots=(1, 3), unlabeled=1)
    logits = baselines.pixel_nearest_neighbour(episode)
    assert logits.shape == (*episode.query_y.shape, 3)
    for task in range(len(episode)):
        kept = episode.support_mask[task] & (episode.support_y[task] != UNLABELED)
        support, slots = episode.support_x[task, kept], episode.support_y[task, kept]
        distances = (episode.query_x[task][:, None] - support).square().sum((2, 3, 4))
        assert torch.equal(logits[task].argmax(-1), slots[distances.argmin(1)])
        torch.testing.assert_close(-logits[task].amax(-1), distances.amin(1), rtol=1e-4, atol=1e-4)


def test_pixel_neighbours_never_answer_with_an_empty_class(baselines):
    episode = sampled(shots=2)
    y = torch.where(episode.support_y == 1, UNLABELED, episode.support_y)
    logits = baselines.pixel_nearest_neighbour(replace(episode, support_y=y, allow_empty=True))
    assert (logits[..., 1] == -math.inf).all()
    assert logits[..., [0, 2]].isfinite().all()


# --- fine-tuning -----------------------------------------------------------------------------------------------


def test_tasks_fine_tuned_together_are_tasks_fine_tuned_alone(finetuning):
    episode, start = sampled(shots=2), finetuning.random_start(TARGET, 3, 3)
    together = finetuning.fine_tune(episode.support_x, episode.support_y, TARGET, start, steps=5)
    for task in range(3):
        one = slice(task, task + 1)
        own = {name: value[one] for name, value in start.items()}
        alone = finetuning.fine_tune(episode.support_x[one], episode.support_y[one], TARGET, own, steps=5)
        for name, value in alone.items():
            torch.testing.assert_close(together[name][one], value, rtol=1e-3, atol=1e-4)


def test_fine_tuning_fits_the_support_and_leaves_its_start_alone(finetuning, baselines):
    episode, start = sampled(shots=3), finetuning.random_start(TARGET, 3, 3)
    before = {name: value.clone() for name, value in start.items()}
    tensors = finetuning.fine_tune(episode.support_x, episode.support_y, TARGET, start, lr=1e-2, steps=60)
    assert all(torch.equal(start[name], value) for name, value in before.items())
    support = replace(episode, query_x=episode.support_x, query_y=episode.support_y)
    assert baselines.accuracy(TARGET.functional(episode.support_x, tensors, "support"), support).min() == 1
    assert not any(value.requires_grad for value in tensors.values())


def test_a_random_start_depends_on_its_seed_alone(finetuning):
    first, again, other = (finetuning.random_start(TARGET, 2, 3, seed) for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("bn_stats", ["query", "support"])
def test_a_curve_says_where_it_peaks(finetuning, baselines, bn_stats):
    episode, start = sampled(shots=3), finetuning.random_start(TARGET, 3, 3)
    curve = finetuning.fine_tuning_curve(episode, TARGET, start, steps=9, every=3, bn_stats=bn_stats)
    assert curve.steps.tolist() == [0, 3, 6, 9]
    assert curve.accuracy.shape == (4, 3)
    assert curve.seconds[0] == 0
    assert (curve.seconds.diff() > 0).all()
    tensors = finetuning.fine_tune(episode.support_x, episode.support_y, TARGET, start, steps=9)
    logits = TARGET.functional(episode.query_x, tensors, bn_stats)
    torch.testing.assert_close(curve.accuracy[-1], baselines.accuracy(logits, episode))
    assert curve.peak.accuracy == curve.accuracy.mean(1).max()
    assert curve.peak.steps == curve.steps[curve.accuracy.mean(1).argmax()]


def test_fine_tuning_refuses_bad_settings_and_labels(finetuning):
    episode, start = sampled(), finetuning.random_start(TARGET, 3, 3)
    with pytest.raises(SettingError, match="lr=0 and steps=5 must be above 0"):
        finetuning.fine_tune(episode.support_x, episode.support_y, TARGET, start, lr=0, steps=5)
    with pytest.raises(SettingError, match="every=0 must be 1 or more"):
        finetuning.fine_tuning_curve(episode, TARGET, start, every=0)
    with pytest.raises(DataError, match=r"fine-tuning: labels 0\.\.3"):
        finetuning.fine_tune(episode.support_x, episode.support_y + (episode.support_y == 2), TARGET, start)


# --- streams ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_const_pn_unrolls_as_a_continual_hypertransformer_does(baselines, scenario):
    sequence = stream()
    rival = made(baselines.ConstPN, GROUPED, scenario)
    model = made(ContinualHyperTransformer, GROUPED, scenario=scenario, max_ways=2)
    ours, theirs = rival.unroll(sequence), model.unroll(sequence)
    assert [answer.shape for answer in ours] == [answer.shape for answer in theirs]
    assert all(torch.equal(one.isinf(), other.isinf()) for one, other in zip(ours, theirs, strict=True))
    loss, table = continual_loss(ours, continual_targets(sequence))
    assert loss.isfinite()
    assert table.shape == (3, 3)


def test_const_pn_is_a_protonet_on_its_first_task(baselines):
    rival = shaken(made(baselines.ConstPN, GROUPED))
    single = baselines.ProtoNet(GROUPED)
    single.load_state_dict(rival.state_dict())
    episode = sampled(shots=2)
    torch.testing.assert_close(rival.unroll([episode])[0].softmax(-1), single(episode).softmax(-1), rtol=1e-4, atol=1e-5)


def test_const_pn_never_forgets_and_its_candidates_only_grow(baselines):
    sequence = stream(n_tasks=4)
    among_all, among_own = (made(baselines.ConstPN, GROUPED, scenario).unroll(sequence) for scenario in ("class", "task"))
    for t in range(1, 4):
        n = 6 * 2 * t
        torch.testing.assert_close(among_own[t][:, :n, : 2 * t], among_own[t - 1])
        torch.testing.assert_close(among_all[t][:, :n, : 2 * t], among_all[t - 1])
        assert (among_own[t][:, :n, 2 * t :] == -math.inf).all()


def test_const_pn_learns_from_the_loss_of_the_continual_model(baselines):
    rival, held_out = made(baselines.ConstPN, GROUPED), stream(step=10_000, sequences=30)
    trainer = MetaTrainer(rival.parameters(), 30, lr=3e-2)

    def loss(sequence):
        return continual_loss(rival.unroll(sequence), continual_targets(sequence))[0]

    before = loss(held_out).item()
    for step in range(30):
        trainer.update(loss(stream(step=step)))
    assert loss(held_out).item() < 0.85 * before


def test_const_pn_refuses_what_would_let_it_forget(baselines):
    with pytest.raises(SettingError, match="norm='batch' lets the answers"):
        baselines.ConstPN(TARGET)
    with pytest.raises(SettingError, match="scenario='minibatch' is unknown"):
        baselines.ConstPN(GROUPED, "minibatch")


@pytest.mark.parametrize("carry", [True, False])
def test_weights_kept_apart_are_the_first_task_of_each_stream(baselines, carry):
    model, sequence = made(ContinualHyperTransformer, GROUPED, max_ways=2, carry=carry), stream()
    found = baselines.multi_ht_task_accuracy(model, sequence)
    expected = torch.stack([baselines.accuracy(model.unroll([episode])[0], episode) for episode in sequence], 1)
    assert torch.equal(found, expected)
    assert found.shape == (4, 3)


def test_a_stream_is_forgotten_without_replay_and_kept_with_it(finetuning):
    sequence = stream(n_tasks=3, sequences=6, shots=5)
    start = finetuning.random_start(GROUPED, 6, 6)
    with_replay, without = (finetuning.fine_tuned_stream(sequence, GROUPED, start, steps=40, replay=replay) for replay in (True, False))
    kept, lost = (found.class_incremental[:, 2, :2].mean() for found in (with_replay, without))
    assert kept > lost + 0.3
    assert lost < 0.2
    above = torch.ones(3, 3).triu(1).bool()
    for table in (with_replay.class_incremental, with_replay.task_incremental):
        assert table.shape == (6, 3, 3)
        assert torch.equal(table.isnan(), above.expand(6, 3, 3))
    assert (with_replay.task_incremental >= with_replay.class_incremental)[:, ~above].all()
    assert torch.equal(with_replay.task_incremental[:, 0, 0], with_replay.class_incremental[:, 0, 0])


def test_the_first_task_of_a_stream_is_plain_fine_tuning(finetuning, baselines):
    sequence = stream(n_tasks=2)
    start = finetuning.random_start(GROUPED, 4, 4)
    found = finetuning.fine_tuned_stream(sequence, GROUPED, start, steps=8)
    first = sequence[0]
    tensors = finetuning.fine_tune(first.support_x, first.support_y, GROUPED, finetuning.random_start(GROUPED, 4, 2), steps=8)
    torch.testing.assert_close(found.class_incremental[:, 0, 0], baselines.accuracy(GROUPED.functional(first.query_x, tensors), first))


def test_a_stream_refuses_another_norm_and_another_head(finetuning):
    sequence = stream(n_tasks=2)
    with pytest.raises(SettingError, match="norm='batch' lets queries"):
        finetuning.fine_tuned_stream(sequence, TARGET, finetuning.random_start(TARGET, 4, 4))
    with pytest.raises(SettingError, match="the tasks have 4 classes, the last layer 3"):
        finetuning.fine_tuned_stream(sequence, GROUPED, finetuning.random_start(GROUPED, 4, 3))
