"""HyperTransformers as learners: batches agree with single tasks, answers compare across tasks, forgetting is exact."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from remanence.errors import DataError, ErasureNotSupported, SettingError, StateMismatchError
from remanence.generated import ContinualHyperTransformerLearner, HyperTransformerLearner, save_hypertransformer
from remanence.generated.continual import ContinualHyperTransformer
from remanence.generated.hypertransformer import HyperTransformer
from remanence.generated.target import TargetNet
from remanence.keys import keyed_rng
from remanence.learner import STOP, fit
from remanence.probes import Accuracy
from remanence.runner import CellRunner
from remanence.state import copy_state, state_bytes, states_equal
from remanence.streams import digits, episodes, split_classes
from remanence.task import Data, Task, concatenate
from remanence.testing import check_learner, tiny_tasks

HT_FORMS = {
    "class means and written": {},
    "class means": {"head": "prototype", "norm": "batch"},
    "written": {"head": "generated", "label_codes": "random", "norm": "batch", "generate_norm": True},
    "last layer only": {"generate": "logits", "norm": "batch"},
}

SIZE = {"max_ways": 4, "width": 16, "depth": 1, "heads": 2}


def make_model(kind=HyperTransformer, norm="group", seed=0, layers=2, **settings):
    with keyed_rng("tiny", seed):
        model = kind(TargetNet(4, image_size=8, n_layers=layers, norm=norm), **SIZE | settings)
        if "logits" in model.generators:  # at the start it writes zeros, and its share could not be missed
            nn.init.normal_(model.generators["logits"].write.weight, std=0.1)
    return model


def make_cht(**settings):
    return make_model(ContinualHyperTransformer, **settings)


def learned(learner, *tasks):
    for task in tasks:
        fit(learner, task)
    return learner


def same(first, second):
    return states_equal(first.state_dict(), second.state_dict())


def refuses(learner, error, match, verb):
    """A verb is refused and leaves no trace."""
    before = copy_state(learner.state_dict())
    with pytest.raises(error, match=match):
        fit(learner, *verb)
    assert states_equal(before, learner.state_dict())


@pytest.fixture(scope="module")
def uneven():
    """Tasks of 2, 3 and 4 classes with 10, 7 and 1 examples."""
    whole = tiny_tasks(4)
    return [
        whole[0],
        Task("three", concatenate([whole[1].train, whole[2].train.select(torch.tensor([0]))]).select(torch.arange(11) > 3), whole[1].test),
        Task("one", whole[3].train.select(torch.tensor([1])), whole[3].test),
    ]


# --- HyperTransformerLearner -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", HT_FORMS)
def test_every_form_keeps_the_contract(form):
    model = make_model(**HT_FORMS[form])
    check_learner(lambda seed: HyperTransformerLearner(model, keep_supports=True, seed=seed), tiny_tasks(2, 6, 3), exact_forget=True)


def test_learning_is_one_pass_over_all_examples(tasks):
    learner = HyperTransformerLearner(make_model())
    taken = list(learner.learn_many(tasks))
    assert [(step.step, step.steps, step.loss, step.n_examples) for step in taken] == [(1, 1, None, 30)]
    assert learner.predict(tasks[1].test.inputs, "task 1").classes.tolist() == [2, 3]


@pytest.mark.parametrize("form", HT_FORMS)
def test_a_batch_of_tasks_equals_single_ones(form, uneven, monkeypatch):
    model = make_model(**HT_FORMS[form])
    single = learned(HyperTransformerLearner(model), *uneven)
    batched = HyperTransformerLearner(model)
    passes, generate = [], batched.model.generate
    monkeypatch.setattr(batched.model, "generate", lambda *args: passes.append(1) or generate(*args))
    list(batched.learn_many(uneven))
    assert len(passes) == 1
    for task in uneven:
        here, there = (learner.state_dict()["tasks"][task.name]["tensors"] for learner in (single, batched))
        assert here.keys() == there.keys()
        for name in here:
            torch.testing.assert_close(here[name], there[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", HT_FORMS)
def test_many_answers_equal_single_ones(form, uneven, monkeypatch):
    learner = HyperTransformerLearner(make_model(**HT_FORMS[form]))
    list(learner.learn_many(uneven))
    inputs = [task.test.inputs[:n] for task, n in zip(uneven, (5, 32, 0), strict=True)]
    names = [task.name for task in uneven]
    alone = [learner.predict(batch, name) for batch, name in zip(inputs, names, strict=True)]
    everywhere = learner.predict(inputs[1])
    monkeypatch.setattr("remanence.generated.hyper_learner._IMAGES_AT_ONCE", 7)
    for asked in (names, [None, None, None], [names[0], None, names[2]]):
        for one, other in zip(alone, learner.predict_many(inputs, asked), strict=True):
            assert torch.equal(one.classes, other.classes)
            torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learner.predict(inputs[1]).logits, everywhere.logits, rtol=1e-5, atol=1e-5)


def test_unnamed_tasks_are_the_newest_in_order(tasks):
    learner = HyperTransformerLearner(make_model())
    assert [len(answer.classes) for answer in learner.predict_many([tasks[0].test.inputs] * 2, [None, None])] == [0, 0]
    learned(learner, *tasks, tasks[0])  # comes again, so that it is the newest
    answers = learner.predict_many([tasks[1].test.inputs] * 2, [None, None])
    assert [answer.classes.tolist() for answer in answers] == [[4, 5], [0, 1]]
    with pytest.raises(DataError, match="4 tasks are asked about, some without a name, and 3 were learned"):
        learner.predict_many([tasks[0].test.inputs] * 4, [None, "task 0", None, None])
    assert learner.predict_many([tasks[0].test.inputs], ["typo"])[0].classes.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_answers_of_all_tasks_are_scaled_squared_distances(tasks, norm):
    learner = learned(HyperTransformerLearner(make_model(head="prototype", norm=norm)), *tasks)
    answer = learner.predict(tasks[0].test.inputs)
    assert answer.classes.tolist() == [0, 1, 2, 3, 4, 5]
    target, scale = learner.model.target, learner.model.log_scale.exp()
    for index, task in enumerate(tasks):
        tensors = learner._stacked([task.name], 2)
        own = target.embed(task.train.inputs[None], tensors, "support")[0]
        means = torch.stack([own[task.train.targets == label].mean(0) for label in task.classes])
        asked = target.embed(tasks[0].test.inputs[None], tensors, "support")[0]
        wanted = -scale * torch.cdist(asked, means).square()
        torch.testing.assert_close(answer.logits[:, 2 * index : 2 * index + 2], wanted, rtol=1e-4, atol=1e-5)


def test_a_written_head_answers_all_tasks_by_plain_logits(tasks):
    learner = learned(HyperTransformerLearner(make_model(head="generated")), *tasks[:2])
    x = tasks[0].test.inputs
    wanted = torch.cat([learner.predict(x, task.name).logits for task in tasks[:2]], 1)
    torch.testing.assert_close(learner.predict(x).logits, wanted, rtol=1e-5, atol=1e-6)


def test_of_a_class_in_two_tasks_the_larger_logit_counts(tasks):
    model, x = make_model(head="generated"), tasks[0].test.inputs
    other = Task("other", Data(tasks[2].train.inputs, tasks[2].train.targets - 3, tasks[2].train.ids), tasks[2].test)  # classes 1 and 2
    learner = learned(HyperTransformerLearner(model), tasks[0], other)
    first, second = (learner.predict(x, name).logits for name in ("task 0", "other"))
    wanted = torch.stack([first[:, 0], torch.maximum(first[:, 1], second[:, 0]), second[:, 1]], 1)
    answer = learner.predict(x)
    assert answer.classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(answer.logits, wanted, rtol=1e-5, atol=1e-6)


def test_slots_go_by_ascending_label(tasks):
    model, data = make_model(), tasks[0].train
    learner = learned(HyperTransformerLearner(model), replace(tasks[0], train=replace(data, targets=9 - data.targets)))
    wanted = model.generate(data.inputs[None], 1 - data.targets[None])
    x = tasks[0].test.inputs
    answer = learner.predict(x, "task 0")
    assert answer.classes.tolist() == [8, 9]
    torch.testing.assert_close(answer.logits, wanted.logits(x[None])[0].detach())


def test_one_task_needs_no_name_and_an_unknown_name_is_none(tasks):
    learner, x = learned(HyperTransformerLearner(make_model()), tasks[0]), tasks[0].test.inputs
    assert torch.equal(learner.predict(x).logits, learner.predict(x, "task 0").logits)
    assert torch.equal(learner.predict(x).logits, learner.predict(x, "never learned").logits)


@pytest.mark.parametrize("gone", [lambda data: data.targets == 2, lambda data: torch.arange(len(data)) < 3])
def test_forgetting_a_part_equals_never_having_learned_it(uneven, gone):
    task, model = uneven[1], make_model()
    rows = gone(task.train)
    learner = learned(HyperTransformerLearner(model, keep_supports=True), *uneven)
    last = fit(learner, task.select(rows), "forget")
    assert (last.step, last.steps, last.n_examples) == (1, 1, int((~rows).sum()))
    assert same(learner, learned(HyperTransformerLearner(model, keep_supports=True), uneven[0], task.select(~rows), uneven[2]))


@pytest.mark.parametrize("keep", [False, True])
def test_forgetting_the_middle_one_of_three_tasks_is_exact(tasks, keep):
    model = make_model(norm="batch")
    learner = learned(HyperTransformerLearner(model, keep_supports=keep), *tasks)
    assert fit(learner, tasks[1], "forget") is None
    assert same(learner, learned(HyperTransformerLearner(model, keep_supports=keep), tasks[0], tasks[2]))


def test_a_part_of_a_joint_task_is_forgotten_under_its_own_name(tasks):
    joint = Task("joint", concatenate([tasks[0].train, tasks[1].train]), tasks[0].test)
    model = make_model()
    learner = learned(HyperTransformerLearner(model, keep_supports=True), joint)
    fit(learner, tasks[0], "forget")
    assert same(learner, learned(HyperTransformerLearner(model, keep_supports=True), replace(joint, train=tasks[1].train)))
    fit(learner, tasks[1], "forget")
    assert learner.state_dict()["tasks"] == {}
    without = learned(HyperTransformerLearner(model), joint)
    said = r"of 'joint', 20 examples were learned and 10 shall go; .* keep_supports=True"
    refuses(without, ErasureNotSupported, said, (tasks[0], "forget"))


def test_what_cannot_be_forgotten_is_refused(tasks):
    part = tasks[0].select(tasks[0].train.targets == 0)
    learner = learned(HyperTransformerLearner(make_model()), tasks[0])
    refuses(learner, ErasureNotSupported, "10 examples were learned and 5 shall go", (part, "forget"))
    refuses(learner, DataError, "'task 1' was never learned", (tasks[1], "forget"))
    keeping = learned(HyperTransformerLearner(make_model(), keep_supports=True), tasks[0])
    strangers = replace(tasks[0], train=replace(tasks[0].train, ids=tasks[0].train.ids + 50))
    refuses(keeping, DataError, "none of these 10 examples is in the support set of 'task 0'", (strangers, "forget"))


def test_a_task_that_comes_again_replaces_itself(tasks):
    model = make_model()
    anew = replace(tasks[0], train=tasks[1].train.select(torch.arange(4)))
    learner = learned(HyperTransformerLearner(model, keep_supports=True), tasks[0], anew)
    assert same(learner, learned(HyperTransformerLearner(model, keep_supports=True), anew))


def test_the_footprint_is_what_belongs_to_the_task_alone(tasks):
    one = learned(HyperTransformerLearner(make_model()), tasks[0]).footprint()
    d = 4 * 2 * 2
    assert (one.shared_bytes, one.task_bytes) == (0, {"task 0": 4 * (4 * 9 + 4 * 36 + 2 * (d + 1))})
    last_only = learned(HyperTransformerLearner(make_model(generate="logits")), tasks[0]).footprint()
    assert last_only.total_bytes == 4 * 2 * (d + 1), "trained kernels belong to the model"
    keeping = learned(HyperTransformerLearner(make_model(), keep_supports=True), tasks[0]).footprint()
    assert keeping.total_bytes - one.total_bytes == 10 * (64 * 4 + 8 + 8)


@pytest.mark.parametrize("form", HT_FORMS)
def test_an_exported_task_is_a_plain_network(form, tasks):
    learner = learned(HyperTransformerLearner(make_model(**HT_FORMS[form])), *tasks)
    cnn = learner.export("task 1")
    assert all(type(module).__module__.startswith("torch.nn") for module in cnn.modules())
    x = tasks[1].test.inputs
    torch.testing.assert_close(cnn(x), learner.predict(x, "task 1").logits, rtol=1e-5, atol=1e-5)
    for name, known in ((None, "task 0, task 1, task 2"), ("typo", "task 0")):
        with pytest.raises(DataError, match=f"export: task {name!r} has no CNN; name one of: {known}"):
            learner.export(name)
    with pytest.raises(DataError, match="nothing was learned"):
        HyperTransformerLearner(make_model()).export()


def both(model_settings=None):
    settings = model_settings or {}
    return [HyperTransformerLearner(make_model(**settings)), ContinualHyperTransformerLearner(make_cht(**settings))]


@pytest.mark.parametrize("learner", both(), ids=["hypertransformer", "continual"])
def test_what_does_not_fit_is_refused_before_anything_changes(learner, tasks):
    data = tasks[0].train
    nan = data.inputs.clone()
    nan[[2, 5], 0, 1, 1] = torch.nan
    many = Task("many", concatenate(task.train for task in tiny_tasks(3)), tasks[0].test)
    for table, match in (
        (replace(data, inputs=data.inputs[:, :, :7]), r"task 'task 0': images are torch.float32 \(N, 1, 7, 8\), .* \(N, 1, 8, 8\)"),
        (replace(data, inputs=data.inputs.mul(255).byte()), "images are torch.uint8"),
        (replace(data, inputs=nan), r"task 'task 0': 2 images have a NaN or infinite pixel \(first three: \[2, 5\]\)"),
        (many.train, "has 6 classes, this model was trained for at most 4"),
    ):
        refuses(learner, DataError, match, (replace(tasks[0], train=table),))
    with pytest.raises(DataError, match=r"inputs: images are torch.float32 \(N, 3, 8, 8\)"):
        learner.predict(torch.rand(2, 3, 8, 8))
    with pytest.raises(DataError, match="test-only"):
        learner.learn(replace(tasks[0], train=None))


def test_groups_of_the_wrong_size_or_of_one_name_are_refused(tasks):
    learner = HyperTransformerLearner(make_model(), n_parallel=2)
    for group in ([], tasks):
        with pytest.raises(SettingError, match=f"learn_many takes 1 to 2 tasks, got {len(group)}"):
            learner.learn_many(group)
    with pytest.raises(DataError, match=r"tasks of one name cannot be learned at once: \['task 0'\]"):
        learner.learn_many([tasks[0], tasks[0]])
    with pytest.raises(SettingError, match="n_parallel=0 must be above 0"):
        HyperTransformerLearner(make_model(), n_parallel=0)


def test_a_model_is_read_from_its_folder_and_never_touched(tasks, tmp_path):
    for make, kind in ((make_model, HyperTransformerLearner), (make_cht, ContinualHyperTransformerLearner)):
        model = make().train()
        before = copy_state(dict(model.state_dict()))
        save_hypertransformer(model, tmp_path)
        here, there = learned(kind(model), tasks[0]), learned(kind(str(tmp_path)), tasks[0])
        assert same(here, there)
        assert model.training
        assert all(value.requires_grad for value in model.parameters())
        assert states_equal(before, dict(model.state_dict()))


def test_a_state_of_another_model_is_refused(tasks):
    for make, kind in ((make_model, HyperTransformerLearner), (make_cht, ContinualHyperTransformerLearner)):
        state = learned(kind(make()), tasks[0]).state_dict()
        with pytest.raises(StateMismatchError, match=r"the state was made with model .* weights and class means have no meaning here"):
            kind(make(seed=1)).load_state_dict(state)


def test_episodes_in_batches_read_as_one_by_one(tmp_path):
    stream, model = episodes(digits(), ways=3, shots_range=(1, 3), queries=4, n=6), make_model(head="prototype")
    found = []
    for n in (1, 4):
        runner = CellRunner(stream, lambda n=n: HyperTransformerLearner(model, n_parallel=n), [Accuracy()], tmp_path / str(n))
        rows = [row for row in runner.run() if row.metric == "accuracy" and row.event >= 0]
        found.append({row.subject: row.value for row in rows})
    assert len(found[0]) == 6
    assert found[0] == found[1]
    assert sum(found[0].values()) / 6 > 0.5, "an untrained trunk with class means beats chance, a third, on digits"


# --- ContinualHyperTransformerLearner --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"keep_supports": True, "batch_size": 5, "on_repeat": "replace"}, {"forgetting": "prototypes"}, {}], ids=str
)
def test_every_way_of_forgetting_keeps_the_contract(settings):
    model = make_cht(update="gate", label_codes="random")
    exact = True if "keep_supports" in settings else None
    check_learner(lambda seed: ContinualHyperTransformerLearner(model, seed=seed, **settings), tiny_tasks(2, 6, 3), exact_forget=exact)


def test_a_task_is_one_step_or_mini_batches_that_see_every_example_once(tasks):
    whole = ContinualHyperTransformerLearner(make_cht())
    assert [(step.step, step.steps, step.n_examples) for step in whole.learn(tasks[0])] == [(1, 1, 10)]
    parts = ContinualHyperTransformerLearner(make_cht(), batch_size=4)
    assert [(step.step, step.steps, step.n_examples) for step in parts.learn(tasks[0])] == [(1, 3, 4), (2, 3, 4), (3, 3, 2)]
    held = parts.state_dict()["held"]
    assert dict(zip(held["labels"], held["counts"][0].tolist(), strict=True)) == {0: 5, 1: 5}
    assert held["book"] == {"task 0": {"0": 5, "1": 5}}
    assert sorted(torch.cat([parts._rows("task 0", tasks[0].train, step) for step in range(3)]).tolist()) == list(range(10))


def test_each_step_starts_from_what_the_one_before_wrote(tasks):
    model = make_cht()
    learner = learned(ContinualHyperTransformerLearner(model), *tasks[:2])
    state = model.init_state()
    for task in tasks[:2]:
        state = model.step(state, task.train.inputs[None], task.train.targets[None] - task.classes[0])
    x = tasks[0].test.inputs
    assert learner.predict(x).classes.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(learner.predict(x).logits.log_softmax(1), model.predict(state, x[None])[0].log_softmax(1).detach())


@pytest.mark.parametrize("batch_size", [None, 4])
def test_replay_equals_never_having_learned_it(tasks, batch_size):
    model = make_cht()

    def make():
        return ContinualHyperTransformerLearner(model, keep_supports=True, batch_size=batch_size)

    for rows in (tasks[1].train.targets == 3, torch.arange(10) < 4, torch.ones(10, dtype=torch.bool)):
        learner = learned(make(), *tasks)
        last = fit(learner, tasks[1].select(rows), "forget")
        n_left = 10 - int(rows.sum())
        assert last.n_examples == n_left + 10, "what is left of the task, and the later one"
        rest = [tasks[1].select(~rows)] if n_left else []
        assert same(learner, learned(make(), tasks[0], *rest, tasks[2]))


def test_a_task_learned_twice_or_in_part_is_forgotten_as_well(tasks):
    model = make_cht()

    def make():
        return ContinualHyperTransformerLearner(model, keep_supports=True, batch_size=4, on_repeat="replace")

    learner = make()
    steps = learner.learn(tasks[0])
    next(steps)
    with pytest.raises(StopIteration):
        steps.send(STOP)
    taken_over = replace(tasks[0], name="again")
    learned(learner, tasks[1], tasks[0], taken_over)  # "again" takes the classes of "task 0" over
    fit(learner, tasks[0], "forget")
    assert same(learner, learned(make(), tasks[1], taken_over))


def test_dropping_the_means_leaves_the_weights(tasks):
    model = make_cht()
    learner = learned(ContinualHyperTransformerLearner(model, forgetting="prototypes"), *tasks[:2])
    before = copy_state(learner.state_dict()["held"])
    fit(learner, tasks[0].select(tasks[0].train.targets == 1), "forget")
    assert learner.predict(tasks[0].test.inputs).classes.tolist() == [0, 2, 3]
    assert learner.predict(tasks[0].test.inputs, "task 0").classes.tolist() == [0]
    fit(learner, tasks[0], "forget")
    after = learner.state_dict()["held"]
    assert states_equal(after["slices"], before["slices"]), "the traces stay"
    assert torch.equal(after["prototypes"], before["prototypes"][:, 2:])
    fit(learner, tasks[1], "forget")
    assert same(learner, ContinualHyperTransformerLearner(model, forgetting="prototypes"))


def test_what_has_no_way_out_is_refused(tasks):
    plain = learned(ContinualHyperTransformerLearner(make_cht()), tasks[0])
    refuses(plain, ErasureNotSupported, "keep_supports=True, .* or say forgetting='prototypes'", (tasks[0], "forget"))
    refuses(plain, DataError, "'task 1' was never learned", (tasks[1], "forget"))
    means = learned(ContinualHyperTransformerLearner(make_cht(), forgetting="prototypes"), tasks[0])
    few = tasks[0].select(torch.arange(10) < 4)
    refuses(means, ErasureNotSupported, r"class 0 has one mean over {'task 0': 5} examples, and 2 of 'task 0' shall go", (few, "forget"))
    learned(means, replace(tasks[0], name="again"))
    refuses(means, ErasureNotSupported, r"one mean over {'task 0': 5, 'again': 5} examples, .* cannot be divided", (tasks[0], "forget"))
    keeping = learned(ContinualHyperTransformerLearner(make_cht(), keep_supports=True), tasks[0])
    strangers = replace(tasks[0], train=replace(tasks[0].train, ids=tasks[0].train.ids + 50))
    refuses(keeping, DataError, "none of these 10 examples of 'task 0' was learned", (strangers, "forget"))


def test_a_class_that_comes_again_has_one_mean(tasks):
    model = make_cht()
    first, more = tasks[0], tasks[1].train.select(torch.tensor([0, 2]))
    again = Task("again", replace(more, targets=torch.tensor([1, 1])), tasks[1].test)
    alone = learned(ContinualHyperTransformerLearner(model), first)
    before = alone.state_dict()["held"]
    merged = learned(ContinualHyperTransformerLearner(model), first, again).state_dict()["held"]
    replaced = learned(ContinualHyperTransformerLearner(model, on_repeat="replace"), first, again)
    after = replaced.state_dict()["held"]
    own = after["prototypes"][0, 1]
    assert (merged["labels"], after["labels"]) == ([0, 1], [0, 1])
    torch.testing.assert_close(merged["prototypes"][0, 1], (5 * before["prototypes"][0, 1] + 2 * own) / 7)
    assert (merged["counts"][0].tolist(), after["counts"][0].tolist()) == ([5, 7], [5, 2])
    assert torch.equal(after["prototypes"][0, 0], before["prototypes"][0, 0])
    assert replaced.predict(first.test.inputs, "again").classes.tolist() == [1]
    assert replaced.predict(first.test.inputs, "task 0").classes.tolist() == [0], "a replaced class belongs to the newest task"
    refusing = learned(ContinualHyperTransformerLearner(model, on_repeat="error"), first)
    refuses(refusing, DataError, r"task 'again': 1 classes are held already \(first three: \[1\]\)", (again,))


def test_a_name_restricts_the_answer_and_an_unknown_one_does_not(tasks):
    learner, x = learned(ContinualHyperTransformerLearner(make_cht()), tasks[1], tasks[0]), tasks[0].test.inputs
    everything = learner.predict(x)
    assert everything.classes.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(learner.predict(x, "task 1").logits, everything.logits[:, 2:])
    assert torch.equal(learner.predict(x, "never learned").logits, everything.logits)


def test_an_exported_state_is_a_network_with_means_as_its_last_layer(tasks):
    learner, x = learned(ContinualHyperTransformerLearner(make_cht()), tasks[1], tasks[0]), tasks[0].test.inputs
    cnn = learner.export()
    assert all(type(module).__module__.startswith("torch.nn") for module in cnn.modules())
    torch.testing.assert_close(cnn(x), learner.predict(x).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learner.export("task 1")(x), learner.predict(x, "task 1").logits, rtol=1e-5, atol=1e-5)
    for asked in (learner, ContinualHyperTransformerLearner(make_cht())):
        with pytest.raises(KeyError, match=r"nothing to export for task 'typo'; learned: (task 1, task 0|nothing)"):
            asked.export("typo")


def test_the_state_grows_by_one_mean_a_class(tasks):
    learner = ContinualHyperTransformerLearner(make_cht())
    sizes = [learned(learner, task).footprint() for task in tasks]
    assert {size.shared_bytes for size in sizes} == {4 * (4 * 9 + 4 * 36)}, "the slices"
    assert sizes[-1].task_bytes == dict.fromkeys(("task 0", "task 1", "task 2"), 2 * (4 * 16 + 4 + 8))
    keeping = learned(ContinualHyperTransformerLearner(make_cht(), keep_supports=True), *tasks)
    assert keeping.footprint().total_bytes == state_bytes(keeping.state_dict()) > sizes[-1].total_bytes


def test_more_tasks_than_any_training_saw_are_taken(tmp_path):
    stream = split_classes(digits(), per_task=2, task_id_at_test=True)
    model = make_cht()
    rows = list(CellRunner(stream, lambda: ContinualHyperTransformerLearner(model), [Accuracy()], tmp_path).run())
    last = [row for row in rows if row.metric == "accuracy" and row.event == 4]
    assert len(last) == 5
    assert all(row.value > 0.5 for row in last)


def test_weights_that_outgrow_their_start_are_told_once(tasks):
    model = make_cht()
    nn.init.constant_(model.generators["conv2"].write.bias, 9e3)
    learner = ContinualHyperTransformerLearner(model)
    with pytest.warns(UserWarning, match="conv2") as told:
        learned(learner, *tasks)
    assert len(told) == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"forgetting": "partly"}, "forgetting='partly' is unknown; give one of exact, prototypes"),
        ({"on_repeat": "never"}, "on_repeat='never' is unknown; give one of merge, replace, error"),
        ({"keep_supports": True, "forgetting": "prototypes"}, "keep_supports=True forgets exactly"),
        ({"batch_size": 0}, "batch_size=0 must be above 0"),
        ({"model": make_model()}, "without recurrence; give it to HyperTransformerLearner"),
        ({"model": make_cht(head="generated")}, "has head='generated' and norm='group'"),
        ({"model": make_cht(norm="batch")}, "has head='prototype' and norm='batch'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, match):
    with pytest.raises(SettingError, match=match):
        ContinualHyperTransformerLearner(**{"model": make_cht()} | settings)
