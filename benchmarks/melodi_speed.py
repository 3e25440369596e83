"""A5: what training, reading and writing cost, and whether MELODI's cost stays where it is along a document.

    python benchmarks/melodi_speed.py            # about five minutes of an idle core; the same as melodi.py --only A5
    python benchmarks/melodi_speed.py --quick    # short documents, one call of each, nothing judged

Sizes are those of A1: d = 128, four layers and heads, windows of 64, calls of 512 tokens in 8 rows. Every model first reads one document
of random bytes, and its state at each length is kept; a call that is timed begins there, so that lengths take turns too. Memories are full
from 4,096 tokens on. Weights are untrained: times do not depend on them.

Rivals take turns in blocks of calls in one process on one thread: a busy machine slows all alike, and none finds the caches of another. A
block's first call is not counted; a figure is the median of all that are. What memorizing-transformers-pytorch does differently is said in
`melodi_speed_rival`; where it is not installed, the figures say so.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np
from continual_cases import Gate
from melodi_arms import COMPARED, COMPARED_ONCE, MELODI, XL, Arm
from melodi_cells import Bench, flushed_denormals
from melodi_sizes import Judged, Size, judged
from melodi_speed_readers import Call, Plan, Reader
from melodi_speed_rival import NAME, TheirReader

READERS = {
    "melodi": MELODI, "transformer-xl": XL, "memorizing": COMPARED["memorizing"], "windowed": COMPARED_ONCE["windowed"],
    "block-recurrent": COMPARED_ONCE["block-recurrent"],
}  # fmt: skip
BY_WINDOW = "melodi, a call for each window"
LIMIT = 0.05
RESIDENT_LIMIT = 0.01
Times = dict[Any, list[list[float]]]


QUICK = Plan(lengths=(512, 1_024, 2_048), compared=(512, 2_048), rounds=1, block=1, train_rounds=1, train_block=1)


# --- timing ----------------------------------------------------------------------------------------------------------------


def take_turns(calls: dict[Any, Call], rounds: int, block: int) -> Times:
    """Seconds of every counted call, by rival and round."""
    times: Times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            counted = []
            for _ in range(block):
                start = time.perf_counter()
                call()
                counted.append(time.perf_counter() - start)
            times[name].append(counted)
    return times


def median(rounds: list[list[float]]) -> float:
    return statistics.median(value for counted in rounds for value in counted)


def rates(times: Times, n_tokens: int) -> dict[Any, int]:
    """Tokens a second."""
    return {name: round(n_tokens / median(rounds)) for name, rounds in times.items()}


def by_rival(found: dict[tuple[str, Any], Any]) -> dict[str, dict[str, Any]]:
    """{(rival, key): value} as {rival: {key: value}}."""
    table: dict[str, dict[str, Any]] = {}
    for (rival, key), value in found.items():
        table.setdefault(rival, {})[str(key)] = value
    return table


def drift(times: Times) -> dict[int, float]:
    """By length, how much longer a call takes than at the middle length of its round; the median over rounds."""
    rounds = [[statistics.median(each) for each in counted] for counted in zip(*times.values(), strict=True)]
    relative = np.array([[value / statistics.median(values) - 1 for value in values] for values in rounds])
    return dict(zip(times, (float(each) for each in np.median(relative, 0)), strict=True))


# --- what is reported --------------------------------------------------------------------------------------------------------


def constancy(melodi: Reader, plan: Plan) -> tuple[dict[str, Any], list[Gate]]:
    """MELODI along the document: time of a window, bytes of its state, bytes of the process."""
    later = plan.lengths[1:]
    times = take_turns({length: melodi.reading(length) for length in later}, plan.rounds + 2, plan.block)
    found, n_windows = drift(times), plan.segment // plan.window
    sizes = {length: {kind: melodi.states[length].nbytes(kind) for kind in ("kv", "stored", "all")} for length in plan.lengths}
    resident = [melodi.resident[length] for length in later]
    figures = {
        f"milliseconds of a window, {plan.rows} rows": {str(key): round(1000 * median(each) / n_windows, 3) for key, each in times.items()},
        "drift of it": {str(length): round(value, 4) for length, value in found.items()},
        "bytes of the state": {str(length): value for length, value in sizes.items()},
        "resident bytes": {str(length): value for length, value in melodi.resident.items()},
    }
    span = f"{later[0]:,} to {later[-1]:,} tokens"
    return figures, [drift_gate(found, span), bytes_gate(sizes, span), resident_gate(resident, span)]


def drift_gate(found: dict[int, float], span: str) -> Gate:
    seen = ", ".join(f"{value:+.1%}" for value in found.values())
    return Gate("A5", f"MELODI's time per window, {span}: constant within 5 %", seen, max(map(abs, found.values())) <= LIMIT)


def bytes_gate(sizes: dict[int, dict[str, int]], span: str) -> Gate:
    kinds = list(sizes.values())
    seen = f"{sorted({each['all'] for each in kinds})} bytes in all, {sorted({each['kv'] for each in kinds})} as keys and values"
    return Gate("A5", f"MELODI's state, {span}: the same bytes", seen, all(each == kinds[0] for each in kinds))


def resident_gate(resident: list[int], span: str) -> Gate:
    growth = max(resident) / min(resident) - 1 if min(resident) else 0.0
    return Gate("A5", f"resident memory while MELODI reads, {span}: flat within 1 %", f"{growth:+.2%}", growth <= RESIDENT_LIMIT)


def throughput(readers: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Tokens a second of training and reading; memory is full."""
    n_tokens, full = plan.rows * plan.segment, plan.compared[0]
    trained = {}
    for name, autocast in (("float32", False), ("bfloat16 products", True)):
        steps = working({rival: reader.training(full, autocast) for rival, reader in readers.items()}, name, trained)
        found = rates(take_turns(steps, plan.train_rounds, plan.train_block), n_tokens)
        trained |= {(rival, name): rate for rival, rate in found.items()}
    reads: dict[tuple[str, Any], Call] = {}
    for rival, reader in readers.items():
        lengths = plan.compared if rival in READERS else (full,)
        reads |= {(rival, length): reader.reading(length) for length in lengths}
        if rival in READERS:
            reads[rival, f"{full}, bfloat16 products"] = reader.reading(full, autocast=True)
    return {
        "training, tokens per second": by_rival(trained),
        "reading, tokens per second by tokens read before": by_rival(rates(take_turns(reads, plan.rounds, plan.block), n_tokens)),
    }


def gain(found: dict[str, Any]) -> dict[str, float]:
    """How much faster MELODI is when a call holds many windows than when it holds one."""
    kinds = {name: (table["melodi"], table[BY_WINDOW]) for name, table in found.items()}
    return {f"{name}: {key}": round(one[key] / each[key], 2) for name, (one, each) in kinds.items() for key in one if key in each}


def working(calls: dict[str, Call], key: str, table: dict[tuple[str, str], Any]) -> dict[str, Call]:
    """The calls that work; what another package says instead of working goes into the table."""
    for rival in [name for name in calls if name == NAME]:
        try:
            calls[rival]()
        except Exception as error:
            table[rival, key] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
            del calls[rival]
    return calls


def writing(readers: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Milliseconds of a token, the complete windows' work included, which falls on one token in 64."""
    table: dict[str, Any] = {}
    for length in plan.compared:
        for rows in (1, plan.rows):
            lasting = {rival: reader for rival, reader in readers.items() if rival in READERS or length == plan.compared[0]}
            times = take_turns({rival: reader.writing(length, rows) for rival, reader in lasting.items()}, plan.rounds, plan.window)
            for rival, rounds in times.items():
                middle, high = (1000 * float(each) for each in np.quantile(np.concatenate(rounds), [0.5, 0.99]))
                found = {"p50": round(middle, 2), "p99": round(high, 2), "tokens per second": round(1000 * rows / mean_ms(rounds))}
                table.setdefault(rival, {})[f"{length} read, {rows} rows"] = found
    return table


def mean_ms(rounds: list[list[float]]) -> float:
    return 1000 * float(np.mean(np.concatenate(rounds)))


def prepared(arms: dict[str, Arm], plan: Plan) -> dict[str, Reader]:
    """The readers, each with its states; MELODI goes first, so that nobody else's memory is counted with its own."""
    readers = {}
    for rival, arm in arms.items():
        readers[rival] = Reader(arm, plan)
        readers[rival].read_document(plan.lengths if rival == "melodi" else plan.compared, plan.segment)
    return readers


def measure(plan: Plan, arms: dict[str, Arm] = READERS) -> Judged:
    """All figures and gates of a plan; MELODI must be among the arms."""
    with flushed_denormals():
        return _measured(plan, arms)


def _measured(plan: Plan, arms: dict[str, Arm]) -> Judged:
    ours = prepared(arms, plan)
    figures, gates = constancy(ours["melodi"], plan)
    by_window = Reader(arms["melodi"], plan, by_window=True)
    by_window.states = ours["melodi"].states
    theirs, said = TheirReader.of(plan)
    others: dict[str, Any] = {BY_WINDOW: by_window} | ({} if theirs is None else {NAME: theirs})
    found = throughput(ours | others, plan)
    everyone: dict[str, Any] = ours | others
    return {
        "timing": f"medians of blocks of calls in turn, one thread, {plan.rows} rows x {plan.segment} tokens a call",
        "plan": {key: value for key, value in plan._asdict().items() if key != "body"},
        "parameters": {rival: sum(p.numel() for p in each.model.parameters()) for rival, each in everyone.items()},
        "bytes of memory as keys and values, a row": {rival: each.states[plan.compared[-1]].nbytes("kv") for rival, each in ours.items()},
        **found,
        "one call's gain over a call for each window": gain(found),
        "writing, ms per token": writing({rival: each for rival, each in everyone.items() if rival != BY_WINDOW}, plan),
        "MELODI along a document": figures,
        NAME: said,
    }, gates


def judge(bench: Bench, size: Size) -> Judged:
    """The experiment as `melodi.py` calls it."""
    figures, gates = measure(Plan() if size.judged else QUICK)
    return figures, judged(size, gates)


def main(arguments: list[str] | None = None) -> int:
    """A5 alone, into the file of the whole benchmark; see `melodi.py`."""
    import melodi

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short documents, one call of each, nothing judged")
    options = parser.parse_args(arguments)
    return melodi.main(["--only", "A5", "--jobs", "1", *(["--quick"] if options.quick else [])])


if __name__ == "__main__":
    sys.exit(main())
