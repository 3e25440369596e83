"""A cell that crashes anywhere, any number of times, ends with the ledger of an uninterrupted one, row for row."""

import pytest
from list_stream import ListStream, exact_rows

from remanence.errors import NotDeterministic, StateMismatchError
from remanence.ledger import Ledger
from remanence.probes import Accuracy
from remanence.runner import CHECKPOINT, CellRunner, is_finished

NAMES = ["fine-tuning", "replay", "EWC", "LoRA prototype", "LoRA oracle", "prototypes", "linear probe"]


class Crash(BaseException):
    """Not an Exception, so that nobody handles it: as close to a kill as one process comes."""


def cell(makers, tasks, name, folder, checkpoint_seconds):
    events = [("learn", tasks[0]), ("learn", tasks[1]), ("forget", tasks[0])]
    stream = ListStream(*events, task_id_at_test=name == "LoRA oracle", bystanders=[tasks[2]])
    return CellRunner(stream, makers[name], [Accuracy(at=1)], folder, ("run", "list", name), 0, checkpoint_seconds)


@pytest.fixture(scope="session")
def uninterrupted(makers, tasks, tmp_path_factory):
    """Name -> the rows of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return {name: exact_rows(cell(makers, tasks, name, folder / name, 0).run()) for name in NAMES}


def burn(monkeypatch, place, fuse):
    """Raise Crash at the fuse-th passage of a place."""
    left = [fuse]

    def passes():
        left[0] -= 1
        return left[0] == 0

    hold, save, append = CellRunner._hold, CellRunner._save, Ledger.append

    def hold_and_crash(self, *args):
        hold(self, *args)
        if passes():
            raise Crash

    def crash_and_save(self, *args, **kwargs):
        if passes():
            raise Crash
        save(self, *args, **kwargs)

    def save_and_crash(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if passes():
            raise Crash

    def append_and_tear(self, rows):
        n_new = append(self, rows)
        if n_new and passes():
            content = self.path.read_bytes()
            self.path.write_bytes(content[: -1 - len(content.splitlines()[-1]) // 2])
            raise Crash
        return n_new

    places = {
        "yield": (CellRunner, "_hold", hold_and_crash),
        "before save": (CellRunner, "_save", crash_and_save),
        "after save": (CellRunner, "_save", save_and_crash),
        "torn line": (Ledger, "append", append_and_tear),
    }
    monkeypatch.setattr(*places[place])


def run_through(make_cell, place, fuse_of):
    """Run again and again, each attempt with its own fuse, until an attempt ends; returns (rows, number of crashes)."""
    for attempt in range(500):
        with pytest.MonkeyPatch.context() as patch:
            burn(patch, place, fuse_of(attempt))
            try:
                return exact_rows(make_cell().run()), attempt
            except Crash:
                pass
    raise AssertionError("the cell makes no headway")


@pytest.mark.parametrize("place", ["yield", "before save", "after save", "torn line"])
@pytest.mark.parametrize("name", NAMES)
def test_a_crash_at_every_step_changes_nothing(name, place, makers, tasks, uninterrupted, tmp_path):
    fuse = 1 if place == "after save" else 2  # with 1, a crash before the first checkpoint would repeat for ever
    rows, n_crashes = run_through(lambda: cell(makers, tasks, name, tmp_path, 0), place, lambda attempt: fuse)
    assert rows == uninterrupted[name]
    assert n_crashes >= 4
    assert exact_rows(Ledger(tmp_path / "ledger.jsonl")) == rows
    assert is_finished(tmp_path, 3)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_saved_until_the_end(name, makers, tasks, uninterrupted, tmp_path):
    def make_cell():
        assert not (tmp_path / CHECKPOINT).exists()
        return cell(makers, tasks, name, tmp_path, 3600)

    rows, n_crashes = run_through(make_cell, "yield", lambda attempt: attempt + 1)
    assert rows == uninterrupted[name]
    assert n_crashes == sum(row["metric"] == "accuracy_seen" and row["step"] is not None for row in rows)


def test_a_finished_cell_does_nothing_when_run_again(makers, tasks, uninterrupted, tmp_path):
    cell(makers, tasks, "replay", tmp_path, 0).run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = cell(makers, tasks, "replay", tmp_path, 0)
    again._run_event = again._probe = None  # neither is called
    assert exact_rows(again.run()) == uninterrupted["replay"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_checkpoint_is_smaller_than_the_whole_history(makers, tasks, tmp_path):
    cell(makers, tasks, "prototypes", tmp_path, 0).run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.safetensors", "ledger.jsonl", "lock"]


def test_a_learner_that_loses_its_moments_is_found_out(makers, tasks, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr("remanence.parts.gradient.load_moments", lambda optimizer, saved: None)
    with pytest.raises(NotDeterministic, match=r"was .*, now .*delete the run folder"):
        run_through(lambda: cell(makers, tasks, "fine-tuning", tmp_path, 0), "torn line", lambda attempt: 2)


def test_a_learner_without_a_cursor_is_found_out(makers, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("remanence.learner.Cursor.load_state_dict", lambda self, state: None)
    with pytest.raises(StateMismatchError, match="went on at step 1, its checkpoint stood at step 1: its state lacks the cursor"):
        run_through(lambda: cell(makers, tasks, "prototypes", tmp_path, 0), "yield", lambda attempt: 2)
