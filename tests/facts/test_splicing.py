import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from injected_world import FACTS, JOY, items, rows, shown, tokenizer
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler

from remanence.errors import DataError, SettingError
from remanence.facts import FactInjector, Massed, Spaced, require_order
from remanence.keys import generator


def injector(facts=FACTS, schedule=None, **settings):
    return FactInjector(facts, tokenizer(), schedule or Spaced(every=3, times=3), **settings)


def account(plan, n_steps):
    return list(plan.exposures(n_steps)[["step", "row", "fact"]].itertuples(index=False, name=None))


def seen(batches):
    return [(step, row, fact) for step, batch in enumerate(batches) for row, fact in shown(batch["input_ids"])]


def test_a_loader_shows_the_facts_at_their_steps():
    plan = injector(row=1)
    data = plan.splice(items(43), batch_size=4, seed=3)
    batches = list(DataLoader(data, batch_size=4))
    assert len(data) == 40
    assert seen(batches) == account(plan, 10)
    assert len(seen(batches)) == 9
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in batches)


def test_a_burst_fills_several_rows():
    plan = injector([JOY], Massed(times=5, per_step=3, start=1))
    assert seen(DataLoader(plan.splice(items(20), 4, 0), batch_size=4)) == account(plan, 5)
    assert [(step, row) for step, row, _ in account(plan, 5)] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]


def test_two_workers_give_the_batches_of_none():
    data = injector().splice(items(40), batch_size=4, seed=3)
    alone, together = (list(DataLoader(data, batch_size=4, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(together) == 10
    assert all(torch.equal(one[name], other[name]) for one, other in zip(alone, together, strict=True) for name in one)


def test_the_control_differs_in_the_injected_rows_only():
    plan, source = injector(row=1), items(40)
    run, control = (each.splice(source, batch_size=4, seed=3) for each in (plan, plan.control()))
    touched = {4 * step + row for step, row, _ in account(plan, 10)}
    differ = {index for index in range(40) if not torch.equal(run[index]["input_ids"], control[index]["input_ids"])}
    assert differ == touched
    assert all(torch.equal(run[index]["labels"], control[index]["labels"]) for index in set(range(40)) - touched)


def test_the_order_comes_from_the_seed_and_leaves_the_source_alone():
    source = items(12)
    before = [item["input_ids"].clone() for item in source]
    plan = injector().control()

    def order(seed):
        return torch.stack([item["input_ids"] for item in plan.splice(source, 4, seed)])

    assert torch.equal(order(None), torch.stack(before))
    assert torch.equal(order(1), order(1))
    assert not torch.equal(order(1), order(2))
    assert torch.equal(order(1), torch.stack(before)[torch.randperm(12, generator=generator(1, "splice"))])
    injector(schedule=Spaced(times=3)).splice(source, 4, 1)[0]
    assert all(torch.equal(item["input_ids"], old) for item, old in zip(source, before, strict=True))


def test_items_may_be_tensors_or_lists():
    bare = injector().splice(rows(40), 4, None)
    assert [(index, fact) for index in range(40) for _, fact in shown(bare[index][None])] == [
        (4 * step + row, fact) for step, row, fact in account(injector(), 10)
    ]
    lists = [{"input_ids": item["input_ids"].tolist(), "labels": item["labels"].tolist(), "source": "a"} for item in items(40)]
    data = injector().splice(lists, 4, None)
    assert data[5]["source"] == "a"
    assert torch.equal(data[0]["input_ids"], bare[0])
    assert torch.equal(data[5]["labels"], bare[5])


def test_indices_behave_as_in_a_list():
    data = injector(schedule=Spaced(times=3)).splice(items(10), 3, 0)
    assert len(list(data)) == len(data) == 9
    assert torch.equal(data[-1]["input_ids"], data[8]["input_ids"])
    with pytest.raises(IndexError):
        data[9]


@pytest.mark.parametrize("n_processes", [2, 4])
def test_processes_share_a_step_and_each_exposure_is_seen_once(n_processes):
    """Both ways of dealing items out, with 4 / n_processes items per process and two accumulated batches a step."""
    plan, per_device = injector(row=3), 4 // n_processes
    data = plan.splice(items(86), batch_size=8, seed=0)
    expected = [(step, fact) for step, _, fact in account(plan, 10)]
    loaders = [
        DataLoader(data, batch_size=per_device, sampler=DistributedSampler(data, n_processes, rank, shuffle=False))
        for rank in range(n_processes)
    ]
    shards = [
        DataLoader(data, batch_sampler=BatchSamplerShard(BatchSampler(SequentialSampler(data), per_device, False), n_processes, rank))
        for rank in range(n_processes)
    ]
    for processes in (loaders, shards):
        found = [(batch // 2, fact) for loader in processes for batch, _, fact in seen(loader)]
        assert sorted(found) == sorted(expected)
        for loader in processes:
            require_order(loader)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: injector().splice(items(40), 2, 0), SettingError, "the facts need rows 0 to 2, the batch has 2"),
        (lambda: injector().control().splice(items(40), 0, 0), SettingError, "batch_size: 0 items; give 1 or more"),
        (lambda: injector().splice(items(27), 4, 0), DataError, "until step 6, there are 6 whole steps of 4 rows; give at least 7"),
        (lambda: injector().splice(items(3), 4, 0), DataError, "3 items make no whole step of 4; give more data"),
        (lambda: injector().splice(items(40, length=3), 4, 0), DataError, "fact 'capital' has 4 tokens, its row 3"),
        (lambda: injector().splice([(1, 2)] * 40, 4, 0), DataError, "item .* of the dataset is a tuple; give dicts with 'input_ids'"),
        (lambda: injector().splice(_Endless(), 4, 0), DataError, r"a _Endless has no length.*injector\.wrap\(loader\)"),
    ],
)
def test_datasets_are_checked_before_the_training(call, error, message):
    with pytest.raises(error, match=message):
        call()


class _Endless(IterableDataset):
    def __iter__(self):
        yield from items(1)


def test_a_loader_that_shuffles_is_refused():
    data = injector().splice(items(40), 4, 0)
    state = torch.get_rng_state()
    in_order = DataLoader(data, batch_size=4)
    resumed = DataLoader(data, batch_sampler=SkipBatchSampler(in_order.batch_sampler, 2))
    for loader in (in_order, resumed, DataLoader(data, batch_size=None)):
        require_order(loader)
    with pytest.raises(SettingError, match=r"draws items by a RandomSampler.*set shuffle=False.*train_sampling_strategy='sequential'"):
        require_order(DataLoader(data, batch_size=4, shuffle=True))
    with pytest.raises(SettingError, match="draws items by a DistributedSampler"):
        require_order(DataLoader(data, batch_size=4, sampler=DistributedSampler(data, 2, 0)))
    assert torch.equal(torch.get_rng_state(), state)
