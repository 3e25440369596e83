"""Read-outs that grow by class, and class means that are exact to take out again."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from remanence.parts import ClassHead, PrototypeHead
from remanence.parts.heads import nearest_mean_logits
from remanence.state import copy_state, states_equal


def test_a_new_row_depends_on_seed_and_label_alone():
    first, second, other = ClassHead(4, 0), ClassHead(4, 0), ClassHead(4, 1)
    first.grow([3, 1, 2])
    for label in (2, 3, 2, 1):
        second.grow([label])
    other.grow([3])
    for label in (1, 2, 3):
        assert torch.equal(first.weight[first.classes.index(label)], second.weight[second.classes.index(label)])
    assert (first.classes, second.classes) == ([3, 1, 2], [2, 3, 1])
    assert not torch.equal(first.weight[0], other.weight[0])


def test_growing_and_dropping_leave_the_other_rows():
    head = ClassHead(4, 0)
    head.grow([5, 6, 7])
    with torch.no_grad():
        head.weight.mul_(3)
        head.bias.add_(torch.tensor([1.0, 2.0, 3.0]))
    rows = head.weight.detach().clone()
    head.grow([9])
    assert torch.equal(head.weight[:3], rows)
    assert head.drop([6, 100]).tolist() == [0, 2, 3]
    assert (head.classes, head.bias.tolist()) == ([5, 7, 9], [1.0, 3.0, 0.0])
    assert torch.equal(head.weight[:2], rows[[0, 2]])
    assert head.columns(torch.tensor([9, 5, 7])).tolist() == [2, 0, 1]
    assert head(torch.zeros(2, 4)).tolist() == [[1.0, 3.0, 0.0]] * 2


def test_an_empty_head_and_a_loaded_one():
    head = ClassHead(4, 0)
    assert head(torch.zeros(2, 4)).shape == (2, 0)
    head.grow([])
    other = ClassHead(4, 0)
    other.grow([1, 2])
    head.load(other.state())
    assert states_equal(head.state(), other.state())
    with torch.no_grad():
        other.weight.zero_()
    assert head.weight.abs().sum() > 0


FEATURES = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 2), st.integers(-100, 100)), min_size=1, max_size=12)


def fill(rows, cuts=()):
    head = PrototypeHead(2)
    bounds = [0, *sorted(cuts), len(rows)]
    for first, last in pairwise(bounds):
        for task in ("a", "b"):
            part = [(label, value) for name, label, value in rows[first:last] if name == task]
            if part:
                head.add(task, torch.tensor([[v, v / 3] for _, v in part], dtype=torch.float32), torch.tensor([k for k, _ in part]))
    return head


@given(FEATURES, st.data())
def test_means_are_those_of_the_examples_in_any_order_and_batching(rows, data):
    shuffled = data.draw(st.permutations(rows))
    cuts = data.draw(st.lists(st.integers(0, len(rows)), max_size=3))
    labels, means = fill(rows).means()
    others, other_means = fill(shuffled, cuts).means()
    assert torch.equal(labels, others)
    torch.testing.assert_close(means, other_means, rtol=0, atol=1e-5)
    for label, mean in zip(labels.tolist(), means, strict=True):
        values = torch.tensor([[v, v / 3] for _, k, v in rows if k == label], dtype=torch.float64)
        torch.testing.assert_close(mean, values.mean(0), rtol=1e-6, atol=1e-5)


@given(FEATURES)
def test_forgetting_a_task_is_never_having_seen_it(rows):
    head = fill(rows)
    head.drop("a")
    assert states_equal(head.state(), fill([row for row in rows if row[0] == "b"]).state())
    head.drop("b")
    assert states_equal(head.state(), PrototypeHead(2).state())


def test_subtracting_all_examples_of_a_class_removes_it():
    head = PrototypeHead(1)
    features, targets = torch.tensor([[0.1], [0.2], [0.7]]), torch.tensor([0, 0, 1])
    head.add("t", features, targets)
    head.subtract("t", features[:1], targets[:1])
    assert torch.allclose(head.means()[1].float(), torch.tensor([[0.2], [0.7]]))
    head.subtract("t", features[1:2], targets[1:2])
    assert head.means()[0].tolist() == [1]


def test_a_class_of_two_tasks_is_weighted_by_examples():
    head = PrototypeHead(1)
    head.add("a", torch.tensor([[0.0], [0.0], [0.0]]), torch.tensor([4, 4, 4]))
    head.add("b", torch.tensor([[4.0]]), torch.tensor([4]))
    assert head.means()[1].tolist() == [[1.0]]
    assert head.means("b")[1].tolist() == [[4.0]]
    assert head.means("c")[0].tolist() == []
    twin = PrototypeHead(1)
    state = copy_state(head.state())
    twin.load(head.state())
    twin.add("a", torch.tensor([[9.0]]), torch.tensor([4]))
    assert states_equal(state, head.state())


def test_nearest_mean_by_hand():
    features, means = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert torch.allclose(nearest_mean_logits(features, means, "euclidean"), torch.tensor([[-4.0, -4.0]]))
    assert torch.allclose(nearest_mean_logits(features, means, "cosine"), torch.tensor([[10 / 5**0.5, 10.0]]))


def test_answers_do_not_depend_on_the_size_of_the_batch():
    draws = torch.Generator().manual_seed(0)
    features, means = 10 + torch.randn(200, 16, generator=draws), 10 + torch.randn(60, 16, generator=draws, dtype=torch.float64)
    whole = nearest_mean_logits(features, means, "euclidean")
    singly = torch.cat([nearest_mean_logits(row[None], means, "euclidean") for row in features])
    exact = -((features[:, None].double() - means[None]) ** 2).sum(-1)
    torch.testing.assert_close(whole, singly, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-5, atol=1e-4)
