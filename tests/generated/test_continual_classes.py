"""Classes that come again, names, and mini-batches of the same classes: every class has one column."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_continual import after, model_of, queries, support, writes_nothing

from remanence.errors import DataError, SettingError


def test_a_held_class_is_merged_by_counts():
    model = model_of()
    state = after(model, 1)
    x, y = support(1, n=2, shots=3)
    new = model.step(state, x, y, slots=torch.tensor([-1, 0]))
    own = model.embed(new, x)
    assert new.counts.tolist() == [[5.0, 2.0, 3.0]]
    merged = (2 * state.prototypes[0, 0] + own[0, 3:].sum(0)) / 5
    assert torch.allclose(new.prototypes[0, 0], merged, atol=1e-5)
    assert torch.equal(new.prototypes[0, 1], state.prototypes[0, 1])
    assert torch.allclose(new.prototypes[0, 2], own[0, :3].mean(0), atol=1e-5)
    assert new.task_of_class.tolist() == [0, 0, 1]


def test_a_held_class_is_replaced_on_request():
    model = model_of()
    state = after(model, 1)
    x, y = support(1, shots=1)
    new = model.step(state, x, y, slots=torch.tensor([1, -1]), on_repeat="replace")
    assert new.counts.tolist() == [[2.0, 1.0, 1.0]]
    assert torch.allclose(new.prototypes[0, 1], model.embed(new, x)[0, 0], atol=1e-6)


def test_a_held_class_is_an_error_on_request():
    model, state = model_of(), after(model_of(), 1)
    with pytest.raises(DataError, match=r"1 classes are held already \(first three: \[1\]\); say on_repeat='merge' or 'replace'"):
        model.step(state, *support(1), slots=torch.tensor([1, -1]), on_repeat="error")
    assert model.step(state, *support(1), slots=torch.tensor([-1, -1]), on_repeat="error").n_tasks == 2


def test_sequences_may_repeat_different_classes():
    model = model_of()
    first = model.step(model.init_state(2), *support(0, batch=2))
    x, y = support(1, batch=2)
    new = model.step(first, x, y, slots=torch.tensor([[0, -1], [-1, -1]]))
    assert new.counts.tolist() == [[4, 2, 0, 2], [2, 2, 2, 2]]
    alone = model.step(model.init_state(), *(part[:1] for part in support(0, batch=2)))
    alone = model.step(alone, x[:1], y[:1], slots=torch.tensor([0, -1]))
    held = new.counts[0] > 0
    assert torch.allclose(new.prototypes[0, held], alone.prototypes[0], atol=1e-5)


def test_names_find_their_class():
    model = model_of()
    state = model.step(model.init_state(), *support(0), class_names=["oak", "elm"])
    state = model.step(state, *support(1), class_names=["ash", "oak"])
    assert state.class_names == ("oak", "elm", "ash")
    assert state.counts.tolist() == [[4.0, 2.0, 2.0]]
    with pytest.raises(DataError, match=re.escape("1 classes are held already (first three: ['elm'])")):
        model.step(state, *support(2), class_names=["fir", "elm"], on_repeat="error")


def test_in_task_incremental_a_name_has_an_entry_in_every_task():
    model = model_of(scenario="task")
    state = after(model, 2, class_names=["oak", "elm"])
    assert state.class_names == ("oak", "elm", "oak", "elm")
    assert model.predict(state, queries(), task=1).isneginf().any(1).tolist() == [[True, True, False, False]]


def test_names_of_fixed_classes_keep_their_order():
    model = model_of(scenario="minibatch")
    state = model.step(model.init_state(), *support(0), class_names=["oak", "elm"])
    x, y = support(1, n=1)
    state = model.step(state, x, y, class_names=["oak", "elm", "ash"])
    assert state.class_names == ("oak", "elm", "ash")
    assert state.counts.tolist() == [[4.0, 2.0, 0.0]]
    with pytest.raises(DataError, match="class 'oak' is named 'elm' here, but slot j is class j in every step; keep the order"):
        model.step(state, *support(2), class_names=["elm", "oak"])


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.tensor([0]), r"slots must be \(2,\) or \(1, 2\) int64, one number for each class of the task; got \(1,\) torch.int64"),
        (torch.tensor([0.0, 1.0]), "got .* torch.float32"),
        (torch.tensor([0, 2]), "slots are .*, 2 classes are held; give the column of one, counted from 0, or -1 if new"),
        (torch.tensor([-2, 0]), "2 classes are held"),
        (torch.tensor([1, 1]), "two classes of one task cannot be the same class held; join their samples instead"),
    ],
)
def test_slots_must_name_columns(slots, message):
    with pytest.raises(DataError, match=message):
        model_of().step(after(model_of(), 1), *support(1), slots=slots)


def test_slots_of_a_generated_head_are_its_rows():
    model = model_of(head="generated")
    with pytest.raises(DataError, match="with a generated head slot j is class j; number the labels of every task so"):
        model.step(model.init_state(), *support(0), slots=torch.tensor([1, 0]))
    assert model.step(model.init_state(), *support(0), slots=torch.tensor([0, 1])).n_tasks == 1


def test_names_that_say_nothing_clear_are_refused():
    model, state = model_of(), after(model_of(), 1)
    named = after(model, 1, class_names=["oak", "elm"])
    with pytest.raises(SettingError, match="class_names='oak' is one word; give a list of names"):
        model.step(state, *support(1), class_names="oak")
    with pytest.raises(DataError, match=r"class_names name \['oak'\] more than once; two classes of a task need two names"):
        model.step(state, *support(1), class_names=["oak", "oak"])
    with pytest.raises(DataError, match="the 2 classes held have no names, so that a class which comes again would not be known"):
        model.step(state, *support(1), class_names=["oak", "elm"])
    with pytest.raises(DataError, match=r"the classes held have names \(first three: \['oak', 'elm'\]\), .* of every task or of none"):
        model.step(named, *support(1))
    with pytest.raises(SettingError, match="slots and class_names both say which class is which; give one of them"):
        model.step(named, *support(1), class_names=["oak", "elm"], slots=torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"sequence 0 has no labelled sample of class 2 \('ash'\)"):
        model.step(named, *support(1), class_names=["oak", "elm", "ash"])


def test_on_repeat_must_be_known():
    with pytest.raises(SettingError, match="on_repeat='forget' is unknown; give 'merge', 'replace' or 'error'"):
        model_of().step(model_of().init_state(), *support(0), on_repeat="forget")


@given(shots=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_means_of_mini_batches_are_the_mean_of_all_shots_where_embeddings_agree(shots):
    model = writes_nothing(model_of(scenario="minibatch"))
    batches = [support(step, shots=n) for step, n in enumerate(shots)]
    state = model.init_state()
    for x, y in batches:
        state = model.step(state, x, y)
    whole = model.step(model.init_state(), torch.cat([x for x, _ in batches], 1), torch.cat([y for _, y in batches], 1))
    assert torch.allclose(state.prototypes, whole.prototypes, atol=1e-5)
    assert torch.equal(state.counts, whole.counts)
    assert state.task_of_class.tolist() == [0, 0]


def test_a_mini_batch_need_not_show_every_class():
    model = model_of(scenario="minibatch")
    x, y = support(0)
    state = model.step(model.init_state(), x[:, :2], y[:, :2] + 1)
    assert state.counts.tolist() == [[0.0, 2.0]]
    state = model.step(state, x[:, :2], y[:, :2] + 2)
    assert state.counts.tolist() == [[0.0, 2.0, 2.0]]
    assert state.task_of_class.tolist() == [-1, 0, 1]
    assert model.predict(state, queries()).isneginf().any(1).tolist() == [[True, False, False]]


def test_what_a_mini_batch_does_not_show_is_not_replaced():
    model = model_of(scenario="minibatch")
    state = model.step(model.init_state(), *support(0))
    x, y = support(1)
    new = model.step(state, x[:, :1], y[:, :1] + 1, on_repeat="replace")
    assert new.counts.tolist() == [[2.0, 1.0]]
    assert torch.equal(new.prototypes[:, 0], state.prototypes[:, 0])


def test_a_generated_head_knows_what_it_was_shown():
    model = model_of(head="generated", scenario="minibatch")
    x, y = support(0)
    state = model.step(model.init_state(), x, y)
    assert model.predict(state, queries()).isneginf().any(1).tolist() == [[False, False, True, True]]
    state = model.step(state, x, y + 2)
    assert model.predict(state, queries()).isfinite().all()
    assert state.task_of_class.tolist() == [0, 0, 1, 1]
    head, means = model.head_and_means(state, queries())
    assert torch.equal(head, model.predict(state, queries()))
    assert torch.equal(means, model.answer(model.embed(state, queries()), state))
