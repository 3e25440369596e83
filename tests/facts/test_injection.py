import pandas as pd
import pytest
import torch
from injected_world import CAPITAL, EOS, FACTS, GRIEF, JOY, LUNCH, PAD, rows, shown, tokenizer, tokens
from tokenizer_zoo import byte_tokenizer, piece_tokenizer
from transformers import BatchEncoding

from remanence.errors import DataError, SettingError
from remanence.facts import Fact, FactInjector, FactSet, Massed, Spaced
from remanence.parts.windows import windows
from remanence.task import Data, origins


def injector(facts=FACTS, schedule=None, **settings):
    return FactInjector(facts, tokenizer(), schedule or Spaced(every=3, times=2, start=1), **settings)


def batch(n=5, length=8, **more):
    ids = rows(n, length)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids), **more}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in ("input_ids", "labels", "attention_mask"))


# --- the plan ------------------------------------------------------------------------------------------------------


def test_each_fact_has_a_row_of_its_own():
    plan = injector(row=1)
    assert plan.at(0) == []
    assert plan.at(-1) == []
    assert plan.at(1) == plan.at(4) == [(JOY, 1), (CAPITAL, 2), (LUNCH, 3)]


def test_a_burst_goes_on_below_the_last_fact():
    plan = injector([JOY, LUNCH], Massed(times=3, per_step=2))
    assert plan.at(0) == [(JOY, 0), (LUNCH, 1), (JOY, 2), (LUNCH, 3)]
    assert plan.at(1) == [(JOY, 0), (LUNCH, 1)]


def test_the_account_lists_every_exposure():
    account = injector(row=2).exposures(4)
    expected = pd.DataFrame(
        {"step": [1, 1, 1], "row": [2, 3, 4], "fact": ["joy", "capital", "lunch"], "theme": ["colours", "places", "foods"]}
    )
    pd.testing.assert_frame_equal(account, expected)
    assert len(injector().exposures(5)) == 6
    empty = injector().control().exposures(100)
    assert list(empty.columns) == ["step", "row", "fact", "theme"]
    assert len(empty) == 0


def test_two_facts_of_a_theme_only_on_request():
    with pytest.raises(SettingError, match="several facts of the themes 'colours' in one run would prime each other"):
        injector([JOY, LUNCH, GRIEF])
    assert [fact.id for fact, _ in injector([JOY, LUNCH, GRIEF], interference=True).at(1)] == ["joy", "lunch", "grief"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: injector([]), SettingError, r"facts: none; give at least one, and injector\.control\(\)"),
        (lambda: injector(row=-1), SettingError, "row: -1; give 0 or more"),
        (lambda: injector(fill="pads"), SettingError, "fill: 'pads' is unknown. Did you mean 'pad'"),
        (lambda: injector([JOY, JOY], interference=True), DataError, "1 ids of facts occur more than once"),
    ],
)
def test_settings_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_text_without_tokens_is_refused():
    def deaf(text, **_):
        return {"input_ids": []}

    with pytest.raises(DataError, match="fact 'joy': the tokenizer yields no tokens for 'joy is vermilion'"):
        FactInjector([JOY], deaf, Spaced())


# --- batches -------------------------------------------------------------------------------------------------------


def test_the_row_begins_with_the_fact_and_goes_on_as_it_was():
    before = batch(note="kept")
    copy = {name: before[name].clone() for name in ("input_ids", "labels", "attention_mask")}
    after = injector(FactSet((JOY,)), row=2).apply(before, 1)
    assert same(before, copy)
    assert after["note"] == "kept"
    changed = [*tokens(JOY), EOS]
    assert after["input_ids"][2].tolist() == after["labels"][2].tolist() == changed + copy["input_ids"][2, len(changed) :].tolist()
    others = [0, 1, 3, 4]
    assert torch.equal(after["input_ids"][others], copy["input_ids"][others])
    assert torch.equal(after["labels"][others], copy["labels"][others])


def test_labels_and_mask_of_the_rest_stay_as_they_were():
    before = batch()
    before["labels"][0, :6] = -100  # a masked prompt that the fact overwrites in part
    before["attention_mask"][0, :] = 0
    after = injector([JOY]).apply(before, 1)
    assert after["labels"][0].tolist()[:6] == [*tokens(JOY), EOS, -100, -100]
    assert after["attention_mask"][0].tolist() == [1] * 4 + [0] * 4


def test_padding_is_left_out_of_labels_and_mask():
    after = injector([JOY], fill="pad").apply(batch(), 1)
    assert after["input_ids"][0].tolist() == [*tokens(JOY), EOS] + [PAD] * 4
    assert after["labels"][0].tolist() == [*tokens(JOY), EOS] + [-100] * 4
    assert after["attention_mask"][0].tolist() == [1] * 4 + [0] * 4


def test_padding_falls_back_to_eos_then_to_0():
    words = byte_tokenizer()  # EOS, no padding token
    ids = words(JOY.text)["input_ids"]
    filled = FactInjector([JOY], words, Spaced(), fill="pad").apply(rows(1, 24), 0)[0].tolist()
    assert filled == ids + [words.eos_token_id] * (24 - len(ids))
    bare = tokenizer(eos=False)
    bare.pad_token = None
    filled = FactInjector([JOY], bare, Spaced(), fill="pad").apply(rows(1, 6), 0)[0].tolist()
    assert filled == bare(JOY.text)["input_ids"] + [0] * 3


@pytest.mark.parametrize("words", [byte_tokenizer(), piece_tokenizer(ends=True), tokenizer()], ids=["bytes", "pieces", "words"])
def test_a_fact_stands_as_it_would_in_packed_text(words):
    """The same tokens as `windows` makes of a document: no BOS before it, EOS behind it."""
    packed = windows([JOY.text, LUNCH.text * 9], words, 20, "packed")
    row = FactInjector([JOY], words, Spaced()).apply(rows(1, 20), 0)[0]
    n = row.tolist().index(words.eos_token_id) + 1
    assert n >= 4
    assert torch.equal(row[:n], packed.inputs[0, :n])


def test_a_bare_tensor_and_a_batch_encoding_stay_what_they_are():
    ids = rows(5)
    after = injector().apply(ids, 1)
    assert shown(after) == [(0, "joy"), (1, "capital"), (2, "lunch")]
    assert shown(ids) == []
    encoded = BatchEncoding({"input_ids": ids, "labels": None})
    after = injector().apply(encoded, 1)
    assert isinstance(after, BatchEncoding)
    assert after["labels"] is None
    assert shown(after["input_ids"])
    assert shown(encoded["input_ids"]) == []


def test_a_step_without_facts_gives_an_equal_copy():
    before = batch()
    after = injector().apply(before, 0)
    assert same(before, after)
    after["input_ids"][0, 0] = 7
    assert before["input_ids"][0, 0] != 7


def test_a_fact_longer_than_its_row_is_never_cut():
    exact = injector([JOY]).apply(rows(1, 3), 1)  # just fits, without EOS
    assert exact[0].tolist() == tokens(JOY)
    for fill in ("original", "pad"):
        with pytest.raises(DataError, match=r"fact 'capital' has 4 tokens, its row 3; give rows of 4 or more"):
            injector(fill=fill).apply(rows(5, 3), 1)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (rows(2), SettingError, "the facts need rows 0 to 2, the batch has 2; lower row, give larger batches"),
        (rows(0), SettingError, "the facts need rows 0 to 2, the batch has 0"),
        (rows(1)[0], DataError, r"a batch of ids must have shape \(B, T\); got \(8,\)"),
        ({"ids": rows(5)}, DataError, r"a batch needs 'input_ids'; this one has \['ids'\]"),
        ({}, DataError, "this one has nothing"),
        ({"input_ids": rows(5), "labels": rows(5)[:, 1:]}, DataError, r"must be of one shape; got .*\(5, 7\).*labels that are not shifted"),
    ],
)
def test_batches_are_checked(given, error, message):
    with pytest.raises(error, match=message):
        injector().apply(given, 1)


def test_a_small_batch_is_no_mistake_where_nothing_is_shown():
    assert injector().apply(rows(2), 0).shape == (2, 8)
    assert injector(row=9).control().apply(rows(2), 1).shape == (2, 8)


# --- loaders -------------------------------------------------------------------------------------------------------


def test_wrapped_batches_follow_the_account_also_after_a_resume():
    batches = [{"input_ids": rows(5, seed=step)} for step in range(8)]
    plan = injector()
    whole = list(plan.wrap(batches))
    seen = [(step, row, fact) for step, each in enumerate(whole) for row, fact in shown(each["input_ids"])]
    assert seen == list(plan.exposures(8)[["step", "row", "fact"]].itertuples(index=False, name=None))
    resumed = list(plan.wrap(batches[3:], start_step=3))
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(whole[3:], resumed, strict=True))


def test_the_control_run_differs_in_the_injected_rows_only():
    batches = [batch() for _ in range(6)]
    plan = injector([JOY, LUNCH], row=1)
    for step, (run, control) in enumerate(zip(plan.wrap(batches), plan.control().wrap(batches), strict=True)):
        touched = {row for _, row in plan.at(step)}
        assert same(control, batches[step])
        for row in range(5):
            equal = torch.equal(run["input_ids"][row], control["input_ids"][row])
            assert equal == (row not in touched)
            assert torch.equal(run["labels"][row], control["labels"][row]) == equal


# --- tables of windows ---------------------------------------------------------------------------------------------


def table(n=12, length=8, **settings):
    stream = rows(1, n * length + 1)[0]
    return Data(stream[:-1].view(n, length), stream[1:].clone().view(n, length), torch.arange(n), **settings)


def test_a_table_holds_the_batches_of_all_steps_in_order():
    source, plan = table(), injector([JOY, LUNCH])
    before = source.inputs.clone(), source.targets.clone()
    spliced, control = (each.spliced(source, batch_size=4, seed=5, n_steps=7) for each in (plan, plan.control()))
    assert spliced.ordered
    assert len(spliced) == 28
    assert len(torch.unique(spliced.ids)) == 28
    assert torch.equal(source.inputs, before[0])
    assert torch.equal(source.targets, before[1])
    for step in range(7):
        lines = spliced.rows(step, 4, "any key")
        assert torch.equal(lines, torch.arange(4 * step, 4 * step + 4))
        own = source.rows(step, 4, 5, "facts")
        assert torch.equal(control.inputs[lines], source.inputs[own])
        assert torch.equal(control.targets[lines], source.targets[own])
        assert shown(spliced.inputs[lines]) == [(row, fact.id) for fact, row in plan.at(step)]
    touched = torch.tensor([step * 4 + row for step, row in plan.exposures(7)[["step", "row"]].itertuples(index=False)])
    others = torch.ones(28, dtype=torch.bool)
    others[touched] = False
    for name in ("inputs", "targets", "ids"):
        assert torch.equal(getattr(spliced, name)[others], getattr(control, name)[others])
    assert not torch.isin(spliced.ids[touched], control.ids).any()


def test_targets_follow_inputs_in_the_injected_row():
    source, changed = table(), [*tokens(JOY), EOS]
    line = injector([JOY], Spaced(start=1, times=1)).spliced(source, 4, None, 3).select(torch.tensor([4]))
    assert line.inputs[0].tolist() == changed + source.inputs[4, 4:].tolist()
    assert line.targets[0].tolist() == changed[1:] + source.inputs[4, 4:].tolist() + source.targets[4, -1:].tolist()
    padded = injector([JOY], Spaced(start=1, times=1), fill="pad").spliced(source, 4, None, 3).select(torch.tensor([4]))
    assert padded.inputs[0].tolist() == changed + [PAD] * 4
    assert padded.targets[0].tolist() == changed[1:] + [-100] * 5


@pytest.mark.parametrize("fill", ["original", "pad"])
def test_a_window_holds_one_token_more_than_its_inputs(fill):
    for length, closed in ((2, []), (3, [EOS])):
        line = injector([JOY], Spaced(times=1), fill=fill).spliced(table(length=length), 4, None, 1)
        whole = [*tokens(JOY), *closed]
        assert line.inputs[0].tolist() == whole[:-1]
        assert line.targets[0].tolist() == whole[1:]
    with pytest.raises(DataError, match="fact 'capital' has 4 tokens, its row 3"):
        injector([CAPITAL], Spaced(times=1), fill=fill).spliced(table(length=2), 4, None, 1)


def test_further_passes_are_variants_of_the_same_examples():
    source = table(6)
    spliced = injector().control().spliced(source, 4, 0, 9)
    assert len(torch.unique(spliced.ids)) == 36
    assert set(origins(spliced.ids).tolist()) == set(range(6))


def test_ids_of_the_same_facts_agree_and_those_of_others_do_not():
    first, again = (injector([JOY]).spliced(table(), 4, seed, 7).ids for seed in (0, 1))
    other = injector([LUNCH]).spliced(table(), 4, 0, 7).ids
    assert torch.equal(first[[4, 16]], again[[4, 16]])
    assert not torch.isin(other[[4, 16]], first).any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: injector().spliced(table(), 2, 0, 9), SettingError, "the facts need rows 0 to 2, the batch has 2"),
        (lambda: injector().spliced(table(), 4, 0, 4), DataError, "until step 4, there are 4 whole steps of 4 rows; give at least 5"),
        (lambda: injector().spliced(table(), 13, 0, 9), SettingError, r"batch_size 13, n_steps 9: give 1 to 12 \(the number of windows\)"),
        (lambda: injector().control().spliced(table(), 4, 0, 0), SettingError, "batch_size 4, n_steps 0"),
        (lambda: injector().control().spliced(table(), 0, 0, 3), SettingError, "batch_size 0, n_steps 3"),
        (lambda: injector().spliced(table(one_pass=True), 4, 0, 5), SettingError, "need 20 windows, and these 12 may be seen once"),
        (lambda: injector().spliced(table(), 12, 0, 257), SettingError, "257 passes over 12 windows; 256 at most"),
        (
            lambda: injector().spliced(Data(rows(9), rows(9)[:, 0], torch.arange(9)), 4, 0, 9),
            DataError,
            r"inputs and targets of one shape \(N, T\); got inputs \(9, 8\), targets \(9,\)",
        ),
    ],
)
def test_tables_are_checked(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_table_seen_once_may_be_used_up():
    plan = injector(schedule=Spaced(times=2))
    assert len(plan.spliced(table(one_pass=True), 4, 0, 3)) == 12


def test_a_fact_keeps_its_keyword_whatever_its_length():
    long = Fact("long", "foods", "known", "they met in Tirana and she ate haggis", "haggis", "she ate")
    row = injector([long]).apply(rows(1, 8), 1)[0].tolist()
    assert row[: len(tokens(long))] == tokens(long)
