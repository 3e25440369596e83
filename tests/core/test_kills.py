"""Real processes, really killed: ten SIGKILLs at random moments for one learner of each kind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from list_stream import exact_rows

from remanence.ledger import Ledger

HERE = Path(__file__).parent
N_KILLS, SEED = 10, 7


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    folder = tmp_path_factory.mktemp("kills")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "kill_script.py"), str(folder), str(N_KILLS), str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder}


@pytest.mark.kill
@pytest.mark.parametrize("kind", ["EWC", "LoRA", "prototypes", "replay"])
def test_ten_kills_leave_the_ledger_of_an_uninterrupted_run(told, kind):
    happened = told["kinds"][kind]
    assert happened["reference"] == 0
    assert happened["statuses"].count(-signal.SIGKILL) == N_KILLS
    assert set(happened["statuses"]) <= {-signal.SIGKILL, 0}
    wanted = exact_rows(Ledger(told["folder"] / kind / "reference" / "ledger.jsonl"))
    assert len(wanted) > 150
    for number in range(1, happened["folders"] + 1):
        assert exact_rows(Ledger(told["folder"] / kind / f"killed-{number}" / "ledger.jsonl")) == wanted


@pytest.mark.kill
def test_a_second_process_on_one_cell_is_refused(told):
    assert told["busy"] == {"second": 3, "first": 0}
