"""Many users' states: evicted, restored, broken, renamed, killed in between; a restored state equals one that stayed."""

import subprocess
import sys

import pytest
import torch

from remanence.context import (
    ContextState,
    MelodiConfig,
    MelodiLM,
    MemorizingConfig,
    MemorizingTransformer,
    StateStore,
    TransformerXL,
    TransformerXLConfig,
    store,
)
from remanence.errors import DataError, RemanenceError, SettingError, StateMismatchError
from remanence.keys import generator, keyed_rng
from remanence.state import states_equal

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "window": 4}
MELODI = MelodiConfig(short=2, long_per_window=1, long_windows=3, long_layers=(1,), **SIZES)
ODD = ("", "..", "../../etc/passwd", "a/b\\c\0d", "x" * 5000, "né \udc80", "CON", ".store.json")


def build(kind=MelodiLM, config=MELODI):
    with keyed_rng("store"):
        return kind(config).eval()


@pytest.fixture
def model():
    return build()


def ids(*key, batch=1, n=7):
    return torch.randint(0, 256, (batch, n), generator=generator("store", *key))


def same(first, second):
    return states_equal(first.state_dict(), second.state_dict())


def visits(n_users, n):
    """Who reads when: every user often, in no order."""
    return torch.randint(0, n_users, (n,), generator=generator("visits")).tolist()


# --- equal to states that stayed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MelodiLM, MELODI),
        (TransformerXL, TransformerXLConfig(cache=4, **SIZES)),
        (MemorizingTransformer, MemorizingConfig(cache=4, memory=8, memory_layer=1, **SIZES)),
    ],
)
def test_twenty_users_with_room_for_three_equal_twenty_states_in_memory(kind, config, tmp_path):
    model = build(kind, config)
    held, stayed = StateStore(tmp_path, model, capacity=3), {}
    for turn, number in enumerate(visits(20, 60)):
        user, tokens = f"user {number}", ids(turn, n=1 + turn % 6)
        with torch.no_grad():
            before = held[user] if user in stayed else None
            logits, held[user] = model(tokens, before)
            expected, stayed[user] = model(tokens, stayed.get(user))
        assert torch.equal(logits, expected)
        assert len(held._held) <= 3
    assert sorted(held) == sorted(stayed)
    assert len(held) == len(stayed) == 20
    assert all(same(held[user], stayed[user]) for user in stayed)


def test_steps_after_a_restore_equal_those_of_a_state_that_stayed_in_the_store(model, tmp_path):
    roomy, tight = StateStore(tmp_path / "roomy", model, capacity=9), StateStore(tmp_path / "tight", model, capacity=1)
    for turn in range(8):
        for user in ("ann", "bob"):
            for each in (roomy, tight):
                state = each[user] if user in each else model.init_state(1)
                _, each[user] = model.step(ids(turn, user, n=1), state)
    assert all(same(roomy[user], tight[user]) for user in ("ann", "bob"))


def test_batches_are_rows_in_the_order_of_the_users(model, tmp_path):
    held, stayed = StateStore(tmp_path, model, capacity=2), {}
    for turn, users in enumerate((["a", "b", "c"], ["c", "a"], ["d", "b"], ["a", "b", "c", "d"])):
        tokens = ids(turn, batch=len(users))
        with torch.no_grad():
            _, state = model(tokens, held.gather(users))
            held.scatter(users, state)
            before = ContextState.join([stayed.get(user, model.init_state(1)) for user in users])
            stayed |= dict(zip(users, model(tokens, before)[1].split(), strict=True))
    assert all(same(held[user], stayed[user]) for user in "abcd")


def test_a_user_of_whom_nothing_is_stored_begins_anew_in_a_batch_and_is_not_stored_by_it(model, tmp_path):
    held = StateStore(tmp_path, model, capacity=2)
    assert same(held.gather(["new"]), model.init_state(1))
    assert "new" not in held
    assert len(held) == 0


def test_the_store_keeps_a_copy_without_gradients_and_without_the_rest_of_the_batch(model, tmp_path):
    held = StateStore(tmp_path, model, capacity=2)
    _, state = model(ids(0, batch=2, n=9))
    held["ann"] = state.split()[0]
    before = state.short[0].clone()
    state.short.data.zero_()
    assert torch.equal(held["ann"].short[0], before)
    assert not held["ann"].short.requires_grad
    assert held["ann"].short.untyped_storage().nbytes() == before.nbytes
    assert held["ann"].cache is None


# --- on disk -------------------------------------------------------------------------------------------------------


def test_a_flushed_store_survives_a_new_process(model, tmp_path):
    held = StateStore(tmp_path / "store", model, capacity=2)
    for user in "abc":
        _, held[user] = model(ids(user))
    held.flush()
    code = f"""
import sys, torch
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
from test_state_store import StateStore, build, ids, same
held = StateStore(sys.argv[1], build(), capacity=1)
assert sorted(held) == ["a", "b", "c"]
model = build()
print(all(same(held[user], model(ids(user))[1]) for user in held))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_what_was_neither_evicted_nor_flushed_is_as_it_was_last_written(model, tmp_path):
    held = StateStore(tmp_path, model, capacity=1)
    _, old = model(ids("old"))
    held["ann"] = old
    held.flush()
    _, held["ann"] = model(ids("new"), old)
    held["bob"] = old  # evicts ann
    assert same(StateStore(tmp_path, model, 1)["ann"], model(ids("new"), old)[1])
    assert "bob" not in StateStore(tmp_path, model, 1)


def test_a_state_that_did_not_change_is_not_written_again(model, tmp_path, monkeypatch):
    held = StateStore(tmp_path, model, capacity=1)
    held["a"], held["b"] = model.init_state(2).split()
    held.flush()
    monkeypatch.setattr(store, "save_context_state", lambda *arguments, **named: pytest.fail("written again"))
    for user in "abab":
        assert same(held[user], model.init_state(1))


def test_a_crash_while_a_state_is_written_loses_nothing(model, tmp_path, monkeypatch):
    held, save = StateStore(tmp_path, model, capacity=1), store.save_context_state
    _, state = model(ids(0))
    held["ann"] = state

    def full(*arguments, **named):
        raise OSError("no space left on device")

    monkeypatch.setattr(store, "save_context_state", full)
    with pytest.raises(OSError, match="no space"):
        held["bob"] = model.init_state(1)
    assert same(held._held["ann"], state)
    monkeypatch.setattr(store, "save_context_state", save)
    assert same(held["bob"], model.init_state(1))
    assert same(held["ann"], state)
    held.flush()
    assert same(StateStore(tmp_path, model, 1)["ann"], state)


@pytest.mark.kill
def test_a_kill_between_writing_and_dropping_leaves_the_file_whole(model, tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
from test_state_store import StateStore, build, ids, store
model, save = build(), store.save_context_state
held = StateStore(sys.argv[1], model, capacity=1)
held["ann"] = model(ids("ann"))[1]
def killed(*arguments, **named):
    save(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)
store.save_context_state = killed
held["bob"] = model.init_state(1)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert same(StateStore(tmp_path / "store", model, 1)["ann"], model(ids("ann"))[1])


def test_names_may_be_any_text_and_stay_inside_the_folder(model, tmp_path):
    held = StateStore(tmp_path / "deep" / "store", model, capacity=2)
    for index, user in enumerate(ODD):
        _, held[user] = model(ids(index))
    held.flush()
    again = StateStore(tmp_path / "deep" / "store", model, capacity=2)
    assert sorted(again) == sorted(ODD)
    assert all(same(again[user], model(ids(index))[1]) for index, user in enumerate(ODD))
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["store"]
    files = {path.name for path in (tmp_path / "deep" / "store").iterdir()} - {"store.json"}
    assert len(files) == len(ODD)
    assert {len(name) for name in files} == {64 + len(".safetensors")}


def test_deleting_reaches_memory_and_disk(model, tmp_path):
    held = StateStore(tmp_path, model, capacity=2)
    held["in memory"], held["on disk"], held["both"] = model.init_state(3).split()
    held["both"] = held["both"]
    for user in ("in memory", "on disk", "both"):
        del held[user]
        assert user not in held
    assert len(held) == 0
    held.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["store.json"]


# --- refusals ------------------------------------------------------------------------------------------------------


def test_an_unknown_user_is_a_key_error_that_reads_well(model, tmp_path):
    held = StateStore(tmp_path, model, capacity=1)
    held["ann"] = model.init_state(1)
    with pytest.raises(KeyError) as raised:
        held["anne"]
    assert isinstance(raised.value, RemanenceError)
    assert str(raised.value) == f"the store in {tmp_path} holds no state of 'anne', but of 1 other users; `in` tells beforehand."
    with pytest.raises(DataError, match="no state of 'bob'"):
        del held["bob"]


def test_a_broken_file_is_one_clear_error_and_harms_no_other_user(model, tmp_path):
    held = StateStore(tmp_path, model, capacity=1)
    held["ann"], held["bob"] = model.init_state(2).split()
    held.flush()
    again = StateStore(tmp_path, model, capacity=1)
    path = again._path("ann")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StateMismatchError, match=r"is not a whole remanence state .* Delete it to begin again"):
        again["ann"]
    assert same(again["bob"], model.init_state(1))
    del again["ann"]
    assert list(again) == ["bob"]


def test_files_that_change_their_names_are_refused(model, tmp_path):
    held = StateStore(tmp_path, model, capacity=1)
    held["ann"] = model.init_state(1)
    held.flush()
    held._path("ann").rename(held._path("bob"))
    with pytest.raises(StateMismatchError, match="holds the state of 'ann', not of 'bob'; files of a store are not renamed"):
        StateStore(tmp_path, model, capacity=1)["bob"]
    store.save_context_state(held._path("bob"), model.init_state(1), model)
    with pytest.raises(StateMismatchError, match="does not say whose state it holds"):
        StateStore(tmp_path, model, capacity=1)["bob"]


def test_a_store_of_another_model_or_of_something_else_is_refused(model, tmp_path):
    StateStore(tmp_path / "store", model, capacity=1)
    other = build(MelodiLM, MelodiConfig(short=3, long_per_window=1, long_windows=3, long_layers=(1,), **SIZES))
    with pytest.raises(StateMismatchError, match=r"holds states of a 'remanence-melodi' with the fingerprint .* name a new folder"):
        StateStore(tmp_path / "store", other, capacity=1)
    (tmp_path / "store" / "store.json").write_text("[]")
    with pytest.raises(StateMismatchError, match=r"store\.json cannot be read"):
        StateStore(tmp_path / "store", model, capacity=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(StateMismatchError, match="exists and is no store of states"):
        StateStore(tmp_path / "mine", model, capacity=1)


def test_what_cannot_be_stored_is_refused(model, tmp_path):
    held = StateStore(tmp_path, model, capacity=1)
    with pytest.raises(DataError, match="the state of 'ann' is a MelodiState of 2 rows; give one row"):
        held["ann"] = model.init_state(2)
    with pytest.raises(DataError, match="is a TransformerXLState of 1 rows"):
        held["ann"] = build(TransformerXL, TransformerXLConfig(cache=4, **SIZES)).init_state(1)
    with pytest.raises(DataError, match="7 is a int; users are named by a str"):
        held[7] = model.init_state(1)
    with pytest.raises(DataError, match="a state of 2 rows for 1 users"):
        held.scatter(["ann"], model.init_state(2))
    with pytest.raises(DataError, match=r"2 users, \['ann'\] more than once"):
        held.gather(["ann", "ann"])
    with pytest.raises(DataError, match="0 users; give one or more"):
        held.gather([])
    with pytest.raises(SettingError, match="capacity=0 must be 1 or more"):
        StateStore(tmp_path, model, capacity=0)
    assert len(held) == 0
