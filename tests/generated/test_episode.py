import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import DataError, SettingError
from remanence.generated import UNLABELED, Episode


def parts(n_tasks: int = 2, ways: int = 3, shots: int = 2, queries: int = 4) -> dict[str, torch.Tensor]:
    """What an Episode is made of, valid."""
    draw = torch.Generator().manual_seed(0)
    return {
        "support_x": torch.rand(n_tasks, ways * shots, 1, 4, 4, generator=draw),
        "support_y": torch.arange(ways).repeat_interleave(shots).repeat(n_tasks, 1),
        "query_x": torch.rand(n_tasks, queries, 1, 4, 4, generator=draw),
        "query_y": torch.randint(ways, (n_tasks, queries), generator=draw),
    }


def changed(name: str, index: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    """The same with one value replaced."""
    made = parts()
    made[name][index] = value
    return made


def test_ways_are_read_off_the_labels_of_each_task():
    made = parts()
    made["support_y"] = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, UNLABELED]])
    made["query_y"] = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 1]])
    episode = Episode(**made)
    assert episode.ways.tolist() == [3, 2]
    assert episode.n_max == 3
    assert len(episode) == 2


def test_a_label_that_only_a_query_has_counts_as_a_way_and_lacks_shots():
    made = changed("query_y", (1, 2), 3)
    with pytest.raises(DataError, match="task 1 has no labelled sample of class 3"):
        Episode(**made)
    assert Episode(**made, allow_empty=True).ways.tolist() == [3, 4]


def test_given_ways_stay():
    assert Episode(**parts(), ways=torch.tensor([3, 3])).ways.tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_floating_point_dtype_is_taken(dtype):
    made = parts()
    made["support_x"], made["query_x"] = made["support_x"].to(dtype), made["query_x"].to(dtype)
    assert Episode(**made).support_x.dtype == dtype


def test_a_sum_that_overflows_is_not_taken_for_a_broken_pixel():
    made = parts()
    made["support_x"] = torch.full_like(made["support_x"], 3e38)
    assert Episode(**made).n_max == 3


def test_no_query_and_a_single_query_are_legal():
    none, single = parts(queries=0), parts(queries=1)
    assert Episode(**none).query_x.shape == (2, 0, 1, 4, 4)
    assert Episode(**single).query_y.shape == (2, 1)
    single.pop("query_y")
    assert Episode(**single).query_y is None


def test_the_inputs_are_not_modified():
    made = parts()
    before = {name: value.clone() for name, value in made.items()}
    Episode(**made, support_mask=torch.ones(2, 6, dtype=torch.bool))
    assert all(torch.equal(made[name], before[name]) for name in made)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("support_x", torch.rand(6, 1, 4, 4), r"support_x must be \(B, S, C, H, W\), got \(6, 1, 4, 4\)\. Episode\.from_tensors"),
        ("query_x", torch.rand(2, 4, 4, 4), r"query_x must be \(B, Q, C, H, W\), got \(2, 4, 4, 4\)"),
        ("support_x", torch.zeros(2, 6, 1, 4, 4, dtype=torch.uint8), r"support_x is torch\.uint8, floating .* x\.float\(\) / 255"),
        ("query_x", torch.zeros(2, 4, 1, 4, 4, dtype=torch.uint8), r"query_x is torch\.uint8"),
        ("query_x", torch.rand(3, 4, 1, 4, 4), "support and query must agree in tasks, image shape and dtype"),
        ("query_x", torch.rand(2, 4, 3, 4, 4), r"agree .* got \(2, 6, 1, 4, 4\) torch\.float32 and \(2, 4, 3, 4, 4\) torch\.float32"),
        ("query_x", torch.rand(2, 4, 1, 5, 5), "Nothing is resized"),
        ("query_x", torch.rand(2, 4, 1, 4, 4, dtype=torch.float64), "agree .* torch.float64"),
        ("support_y", torch.zeros(2, 5, dtype=torch.int64), r"support_y must be \(2, 6\) torch\.int64, got \(2, 5\)"),
        ("support_y", torch.zeros(2, 6), r"support_y must be .* torch\.float32\. Episode\.from_labels takes labels of other kinds"),
        ("query_y", torch.zeros(2, 4, dtype=torch.int32), r"query_y must be \(2, 4\) torch\.int64, got \(2, 4\) torch\.int32"),
        ("support_mask", torch.ones(2, 6), r"support_mask must be \(2, 6\) torch\.bool, got \(2, 6\) torch\.float32\.$"),
        ("ways", torch.tensor([3]), r"ways must be \(2,\) torch\.int64, got \(1,\) torch\.int64\.$"),
        ("query_x", torch.rand(2, 4, 1, 4, 4, device="meta"), r"must share a device, got \['cpu', 'meta'\]; use Episode\.to"),
        ("ways", torch.tensor([3, 0]), "ways of task 1 is 0; a task has at least one class"),
        ("class_names", (("a", "b", "c"), ("a", "b")), r"class_names name \[3, 2\] classes a task, ways are \[3, 3\]"),
        ("class_names", (("a", "b", "c"),), r"class_names name \[3\] classes"),
        ("class_ids", torch.zeros(2, 2, dtype=torch.int64), r"class_ids must be \(2, 3\) int64, got \(2, 2\)"),
        ("class_ids", torch.zeros(2, 3), r"class_ids must be \(2, 3\) int64, got \(2, 3\) torch\.float32"),
    ],
)
def test_tables_that_do_not_fit_are_refused(name, value, message):
    with pytest.raises(DataError, match=message):
        Episode(**{**parts(), name: value})


def test_an_empty_support_is_refused():
    with pytest.raises(DataError, match=r"support_x of shape \(2, 0, 1, 4, 4\) holds nothing"):
        Episode(**parts(shots=0))
    with pytest.raises(DataError, match="holds nothing; give at least one task"):
        Episode(**parts(n_tasks=0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_pixel_is_named(value):
    with pytest.raises(DataError, match=r"support sample 4 of task 1 has a NaN or infinite pixel \(1 such samples\)"):
        Episode(**changed("support_x", (1, 4, 0, 2, 3), value))
    with pytest.raises(DataError, match="query sample 3 of task 0 has a NaN"):
        Episode(**changed("query_x", (0, 3, 0, 0, 0), value))


def test_infinities_that_cancel_are_found():
    made = changed("support_x", (0, 1, 0, 0, 0), float("inf"))
    made["support_x"][1, 2, 0, 0, 0] = float("-inf")
    with pytest.raises(DataError, match=r"support sample 1 of task 0 .*\(2 such samples\)"):
        Episode(**made)


def test_a_broken_pixel_is_refused_where_masked_too():
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4] = False
    with pytest.raises(DataError, match="sample 4 of task 1"):
        Episode(**changed("support_x", (1, 4, 0, 2, 3), float("nan")), support_mask=mask)


def test_labels_that_are_no_slot_are_refused():
    ways = torch.tensor([3, 3])
    with pytest.raises(DataError, match=r"support_y of task 1, sample 5 is 3; slots 0\.\.2 are needed, or -1 for unlabelled \(1 such"):
        Episode(**changed("support_y", (1, 5), 3), ways=ways)
    with pytest.raises(DataError, match=r"support_y of task 0, sample 2 is -2; .*Episode\.from_labels maps other labels"):
        Episode(**changed("support_y", (0, 2), -2))
    with pytest.raises(DataError, match=r"query_y of task 0, sample 1 is 7; slots 0\.\.2 are needed \("):
        Episode(**changed("query_y", (0, 1), 7), ways=ways)
    with pytest.raises(DataError, match="query_y of task 1, sample 0 is -1"):
        Episode(**changed("query_y", (1, 0), UNLABELED))


def test_a_huge_label_is_refused_without_a_table_of_that_size():
    with pytest.raises(DataError, match="task 0 has no labelled sample of class 2"):
        Episode(**{**parts(shots=1), "support_y": torch.tensor([[0, 1, 10**15], [0, 1, 2]])})


def test_more_ways_than_samples_are_refused():
    with pytest.raises(DataError, match="task 1 has no labelled sample of class 3"):
        Episode(**parts(shots=1), ways=torch.tensor([3, 4]))


def test_a_task_without_any_label_is_refused():
    made = parts()
    made["support_y"][1] = UNLABELED
    for allow_empty in (False, True):
        with pytest.raises(DataError, match=r"task 1 has no labelled sample in its support \(1 such tasks\)"):
            Episode(**made, allow_empty=allow_empty)
    mask = torch.tensor([[True] * 6, [False] * 6])
    with pytest.raises(DataError, match="task 1 has no labelled sample in its support"):
        Episode(**parts(), support_mask=mask)


def test_a_class_without_a_labelled_present_shot_is_refused_by_task_and_name():
    names = (("a", "b", "c"), ("d", "e", "f"))
    hidden = parts()
    hidden["support_y"][1, 2:4] = UNLABELED
    with pytest.raises(DataError, match=r"task 1 has no labelled sample of class 1 \('e'\); give it one, or say allow_empty=True"):
        Episode(**hidden, class_names=names)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    with pytest.raises(DataError, match="task 0 has no labelled sample of class 2; give it one"):
        Episode(**parts(), support_mask=mask)
    assert Episode(**parts(), support_mask=mask, allow_empty=True).n_max == 3


def test_one_task_gets_its_axis():
    made = parts()
    single = Episode.from_tensors(*(value[0] for value in made.values()))
    assert single.support_x.shape == (1, 6, 1, 4, 4)
    assert torch.equal(single.query_y, made["query_y"][:1])
    assert Episode.from_tensors(made["support_x"][0], made["support_y"][0], made["query_x"][0]).query_y is None
    batch = Episode.from_tensors(**made)
    assert torch.equal(batch.support_x, made["support_x"])


def test_a_batch_with_the_queries_of_one_task_is_refused():
    made = parts()
    with pytest.raises(DataError, match="query_x must be"):
        Episode.from_tensors(made["support_x"], made["support_y"], made["query_x"][0])


@pytest.mark.parametrize(
    "labels",
    [["oak", "elm", "oak"], (True, False, True), np.array([0.5, 0.25, 0.5]), np.array(["oak", "elm", "oak"]), torch.tensor([7, 3, 7])],
    ids=str,
)
def test_labels_of_any_kind_become_slots_and_stay_as_names(labels):
    episode = Episode.from_labels(torch.rand(3, 1, 4, 4), labels, torch.rand(2, 1, 4, 4), labels[1:3])
    assert episode.support_y.tolist() == [[0, 1, 0]]
    assert episode.query_y.tolist() == [[1, 0]]
    plain = labels.tolist() if hasattr(labels, "tolist") else labels
    assert episode.class_names == ((str(plain[0]), str(plain[1])),)


def test_unknown_labels_are_none():
    episode = Episode.from_labels(torch.rand(3, 1, 4, 4), [None, "elm", None], torch.rand(0, 1, 4, 4))
    assert episode.support_y.tolist() == [[UNLABELED, 0, UNLABELED]]
    assert episode.query_y is None
    with pytest.raises(DataError, match="no labelled sample in its support"):
        Episode.from_labels(torch.rand(2, 1, 4, 4), [None, None], torch.rand(1, 1, 4, 4))


def test_labels_that_cannot_be_mapped_are_refused():
    images = torch.rand(2, 1, 4, 4)
    with pytest.raises(DataError, match=r"2 query labels occur in no support sample \(first three: \['ash', None\]\); label"):
        Episode.from_labels(images, ["oak", "elm"], images, ["ash", None])
    with pytest.raises(DataError, match=r"several labels print as \['1'\]; give labels of one kind"):
        Episode.from_labels(images, [1, "1"], images)
    with pytest.raises(DataError, match=r"support_y must be \(1, 2\) .* got \(1, 3\)"):
        Episode.from_labels(images, ["oak", "elm", "oak"], images)


def learn2learn_batch(ways: int, rows: int, shuffled: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A task as learn2learn gives it: rows by class, every image filled with its row number."""
    data = torch.arange(ways * rows).float()[:, None, None, None].expand(-1, 1, 4, 4)
    labels = torch.arange(ways).repeat_interleave(rows)
    order = torch.randperm(ways * rows, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(ways * rows)
    return data[order], labels[order]


@pytest.mark.parametrize(("shots", "ways"), [(1, 5), (3, 2)])
def test_learn2learn_tasks_split_as_its_maml_examples_do(shots, ways):
    data, labels = learn2learn_batch(ways, 2 * shots)
    adapts = np.zeros(len(data), dtype=bool)
    adapts[np.arange(shots * ways) * 2] = True
    episode = Episode.from_learn2learn((data, labels), shots, ways)
    assert torch.equal(episode.support_x[0], data[adapts])
    assert torch.equal(episode.query_x[0], data[~adapts])
    assert torch.equal(episode.support_y[0], labels[adapts])
    assert torch.equal(episode.query_y[0], labels[~adapts])


@pytest.mark.parametrize("shuffled", [False, True])
def test_learn2learn_tasks_with_more_queries_split_by_class(shuffled):
    data, labels = learn2learn_batch(ways=3, rows=7, shuffled=shuffled)
    episode = Episode.from_learn2learn((data, labels.int()), shots=2, ways=3)
    assert torch.bincount(episode.support_y[0]).tolist() == [2, 2, 2]
    assert torch.bincount(episode.query_y[0]).tolist() == [5, 5, 5]
    chosen = data[torch.cat([torch.nonzero(labels == label)[:2, 0] for label in range(3)]).sort().values]
    assert torch.equal(episode.support_x[0], chosen)


@pytest.mark.parametrize(("ways", "rows", "shots"), [(3, 2, 2), (4, 2, 1), (2, 3, 1)])
def test_learn2learn_rows_that_do_not_divide_are_refused(ways, rows, shots):
    data, labels = learn2learn_batch(3, rows)
    if (ways, rows) == (2, 3):
        data, labels = data[:-1], labels[:-1]
    with pytest.raises(DataError, match=rf"rows with \d labels of 3 classes do not make {ways} classes of {shots} shots"):
        Episode.from_learn2learn((data, labels), shots, ways)


def test_learn2learn_tasks_in_any_order_keep_their_shots():
    episode = Episode.from_learn2learn(learn2learn_batch(ways=4, rows=6, shuffled=True), shots=3, ways=4)
    assert torch.bincount(episode.support_y[0]).tolist() == torch.bincount(episode.query_y[0]).tolist() == [3] * 4


def test_learn2learn_counts_below_one_are_refused():
    for shots, ways in ((0, 2), (1, 0)):
        with pytest.raises(SettingError, match=f"shots: {shots}, ways: {ways}; give 1 or more"):
            Episode.from_learn2learn(learn2learn_batch(2, 2), shots, ways)


def test_unmapped_learn2learn_labels_are_refused():
    data, labels = learn2learn_batch(2, 2)
    with pytest.raises(DataError, match="task 0 has no labelled sample of class 0"):
        Episode.from_learn2learn((data, labels + 3), 1, 2)


def test_selected_tasks_keep_their_columns():
    made = parts(n_tasks=3)
    made["support_y"][2] = torch.tensor([0, 0, 0, 1, 1, 1])
    made["query_y"][2] = 1
    names = (("a", "b", "c"), ("d", "e", "f"), ("g", "h"))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, -1]])
    whole = Episode(**made, support_mask=torch.ones(3, 6, dtype=torch.bool), class_names=names, class_ids=ids)
    assert whole.n_max == 3
    one = whole.select(torch.tensor([2]))
    assert (len(one), one.n_max, one.class_names, one.class_ids.tolist()) == (1, 2, (("g", "h"),), [[7, 8]])
    masked = whole.select(torch.tensor([True, False, True]))
    assert torch.equal(masked.support_x, made["support_x"][[0, 2]])
    assert masked.class_names == (names[0], names[2])
    assert masked.support_mask.shape == (2, 6)
    assert len(whole) == 3


@pytest.mark.parametrize("tasks", [torch.tensor(1), torch.tensor([], dtype=torch.int64), torch.tensor([False, False])], ids=str)
def test_a_selection_of_no_task_is_refused(tasks):
    with pytest.raises(DataError, match=r"tasks selects \(.*\) of 2; give a 1-D index or mask"):
        Episode(**parts()).select(tasks)


def test_moving_checks_nothing_again_and_keeps_the_rest():
    episode = Episode(**parts(), class_names=(("a", "b", "c"), ("d", "e", "f")))
    n_max = episode.n_max
    moved = episode.to("meta")
    assert {moved.support_x.device.type, moved.query_y.device.type, moved.ways.device.type} == {"meta"}
    assert moved.class_names == episode.class_names
    assert episode.support_x.device.type == "cpu"
    assert (moved.support_mask, episode.to(torch.device("cpu")).n_max) == (None, n_max)


@pytest.mark.gpu
def test_an_episode_moves_to_an_accelerator():
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    episode = Episode(**parts()).to("cuda")
    assert (episode.n_max, episode.support_y.device.type) == (3, "cuda")
    assert Episode.from_tensors(episode.support_x, episode.support_y, episode.query_x).n_max == 3  # the checks run there too


@settings(deadline=None, max_examples=40)
@given(data=st.data(), ways=st.integers(2, 6), extra=st.integers(-1, 5))
def test_a_support_is_refused_exactly_when_a_class_has_no_shot(data, ways, extra):
    n = ways + extra
    labels = data.draw(st.lists(st.integers(-1, ways - 1), min_size=n, max_size=n))
    mask = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    shown = {label for label, is_present in zip(labels, mask, strict=True) if is_present and label != UNLABELED}
    tensors = {
        "support_x": torch.zeros(1, n, 1, 2, 2),
        "support_y": torch.tensor([labels]),
        "query_x": torch.zeros(1, 0, 1, 2, 2),
        "support_mask": torch.tensor([mask]),
        "ways": torch.tensor([ways]),
    }
    if shown == set(range(ways)):
        assert Episode(**tensors).n_max == ways
        return
    with pytest.raises(DataError) as caught:
        Episode(**tensors)
    if shown:
        assert f"class {min(set(range(ways)) - shown)};" in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(some=st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=12), one=st.text(max_size=3))
def test_slots_name_the_labels_they_came_from(some, one):
    labels = [*some, one]
    episode = Episode.from_labels(torch.zeros(len(labels), 1, 2, 2), labels, torch.zeros(0, 1, 2, 2))
    back = [None if slot == UNLABELED else episode.class_names[0][slot] for slot in episode.support_y[0].tolist()]
    assert back == labels
