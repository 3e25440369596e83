"""M4, M8 and M9: what memory learns beside its rivals, whether it transfers, and how it should begin.

Every arm has four learning rates, judged on a validation part of the train rows at a seed that is used nowhere else.
Differences are paired by seed; a seed is the backbone's pretraining, the arm's initialisation and the order of its
batches at once (on Omniglot one backbone serves all seeds).
"""

from collections.abc import Iterable
from statistics import mean, stdev
from typing import Any

from continual_cases import Gate
from memory_tokens_arms import (
    ARMS,
    EVALUATED,
    RATES,
    SHORT,
    STARTS,
    STEPS,
    TUNING_SEED,
    Job,
    accuracy,
    backbone_of,
    few_of,
    make,
    run_jobs,
    source_of,
    task_of,
    tune,
)
from scipy.stats import t as student

from remanence.learner import fit
from remanence.probes.statistics import interval

Part = dict[str, Any]
OURS, PARAMETERS_WITHIN = "memory M=5", 0.2
PARTS_OF_OURS = ("head", "head + class token")
RIVALS = ("VPT-deep M=5", "LoRA rank 1")
QUICK_RATE = {arm: 1e-3 if arm == "full fine-tuning" else 1e-2 for arm in ARMS | STARTS}
N_FEW, FEW_STEPS = 20, 300


def paired(first: list[float], second: list[float]) -> dict[str, float]:
    """Mean difference with its 95 % interval, standard error, and one-sided 95 % bounds."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    error = stdev(differences) / len(differences) ** 0.5
    reach = float(student.ppf(0.95, len(differences) - 1)) * error
    found = interval(differences)._asdict()
    return {name: float(value) for name, value in found.items()} | {
        "standard_error": error, "one_sided_low": found["mean"] - reach, "one_sided_high": found["mean"] + reach,
    }  # fmt: skip


def points(value: dict[str, float]) -> str:
    """A difference for a terminal."""
    return f"{100 * value['mean']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}] points"


def summary(values: list[float]) -> dict[str, Any]:
    """Interval and values by seed."""
    return {name: float(value) for name, value in interval(values)._asdict().items()} | {"seeds": values}


# --- M4 ----------------------------------------------------------------------------------------------------------


def compare(dataset: str, arms: Iterable[str], seeds: list[int], n_processes: int, quick: bool, tasks: tuple[str, ...] = ()) -> Part:
    """Tune every arm, run it over all seeds; of several tasks the mean accuracy counts, and the first one is tuned on.

    Args:
        tasks: datasets that share a backbone; `dataset` alone by default.
    """
    arms, tasks = list(arms), tasks or (dataset,)
    tuning = {} if quick else tune(tasks[0], arms, STEPS, n_processes)
    rate = {arm: tuning[arm]["best"] if tuning else QUICK_RATE[arm] for arm in arms}
    jobs = [Job(task, arm, seed, rate[arm]) for task in tasks for arm in arms for seed in seeds]
    found = run_jobs(jobs, n_processes)
    rows = []
    for arm in arms:
        results = {seed: [found[Job(task, arm, seed, rate[arm])] for task in tasks] for seed in seeds}
        values = [mean(result["accuracy"] for result in own) for own in results.values()]
        first = results[seeds[0]][0]
        rows.append(
            {
                "arm": arm, "lr": rate[arm], "accuracy": summary(values), "trainable_parameters": first["trainable_parameters"],
                "steps": first["steps"], "cpu_seconds": mean(result["cpu_seconds"] for own in results.values() for result in own),
            }
        )  # fmt: skip
    return {"dataset": dataset, "tasks": list(tasks), "seeds": seeds, "tuning_seed": TUNING_SEED, "tuning": tuning, "rows": rows}


def values_of(part: Part, arm: str) -> list[float]:
    """Accuracies by seed."""
    found: list[float] = next(row["accuracy"]["seeds"] for row in part["rows"] if row["arm"] == arm)
    return found


def differences(part: Part) -> dict[str, dict[str, float]]:
    """Memory with five tokens minus every other arm, paired by seed."""
    others = [row["arm"] for row in part["rows"] if row["arm"] != OURS]
    return {f"{OURS} - {other}": paired(values_of(part, OURS), values_of(part, other)) for other in others}


def size_gate(part: Part, row: str) -> Gate:
    """Baselines train about as many numbers as memory with five tokens."""
    sizes = {found["arm"]: found["trainable_parameters"] for found in part["rows"]}
    shares = {arm: sizes[arm] / sizes[OURS] for arm in RIVALS}
    seen = f"{OURS} {sizes[OURS]:,}; " + ", ".join(f"{arm} {sizes[arm]:,} ({share:.2f})" for arm, share in shares.items())
    passed = all(abs(share - 1) <= PARAMETERS_WITHIN for share in shares.values())
    return Gate(row, "trainable parameters of VPT-deep and LoRA within 20 % of M=5", seen, passed)


def digits_part(quick: bool, n_processes: int) -> tuple[Part, list[Gate]]:
    """M4 on digits: all arms, gated; and shuffled labels against a lucky number."""
    seeds = list(range(2 if quick else 10))
    part = compare("digits", ARMS, seeds, n_processes, quick)
    part["differences"] = differences(part)
    rate = next(row["lr"] for row in part["rows"] if row["arm"] == OURS)
    deals = [Job("digits", OURS, seed, rate, shuffle=True) for seed in seeds]
    part["shuffled_labels"] = summary([result["accuracy"] for result in run_jobs(deals, n_processes).values()])
    print_comparison(part)
    if not quick:
        part["at_equal_rates"] = at_equal_rates(seeds, n_processes)
    return part, digits_gates(part, judged=not quick)


def at_equal_rates(seeds: list[int], n_processes: int) -> dict[str, Any]:
    """How much of the gated difference is the choice of rates: both sides at each of the four, all seeds. Not gated."""
    jobs = [Job("digits", arm, seed, lr) for arm in (OURS, *PARTS_OF_OURS) for lr in RATES for seed in seeds]
    found = run_jobs(jobs, n_processes)
    values = {
        (arm, lr): [found[Job("digits", arm, seed, lr)]["accuracy"] for seed in seeds] for arm in (OURS, *PARTS_OF_OURS) for lr in RATES
    }
    table: dict[str, Any] = {f"{arm} @ {lr:g}": summary(own) for (arm, lr), own in values.items()}
    for other in PARTS_OF_OURS:
        for lr in RATES:
            table[f"{OURS} - {other} @ {lr:g}"] = paired(values[OURS, lr], values[other, lr])
            print(f"  rate {lr:g}, {OURS} - {other}: {points(table[f'{OURS} - {other} @ {lr:g}'])}")
    return table


def digits_gates(part: Part, judged: bool) -> list[Gate]:
    """Equal care for the baselines, and, where there are seeds enough, memory against what it adds to."""
    gates = [size_gate(part, "M4")]
    if not judged:
        return gates
    for other in PARTS_OF_OURS:
        value = part["differences"][f"{OURS} - {other}"]
        seen = f"{points(value)}, {value['mean'] / value['standard_error']:.1f} s.e., n {value['n']:.0f}"
        gates.append(Gate("M4", f"{OURS} - {other}: paired mean > 2 s.e.", seen, value["mean"] > 2 * value["standard_error"]))
    control = part["shuffled_labels"]
    seen = f"{100 * control['mean']:.1f} [{100 * control['low']:.1f}, {100 * control['high']:.1f}] %"
    return [*gates, Gate("M4", f"labels shuffled, {OURS}: chance (20 +- 5 %)", seen, abs(control["mean"] - 0.2) <= 0.05)]


def fashion_part(quick: bool, n_processes: int) -> tuple[Part, list[Gate]]:
    """M4 on 2,000 images of Fashion-MNIST, reported."""
    part = compare("fashion", SHORT, list(range(2 if quick else 5)), n_processes, quick)
    part["differences"] = differences(part)
    print_comparison(part)
    return part, [size_gate(part, "M4 fashion")]


def omniglot_part(quick: bool, n_processes: int) -> tuple[Part, list[Gate]]:
    """M4 on evaluation alphabets of Omniglot, 15 train and 5 test images a character, reported."""
    tasks = tuple(f"omniglot:{alphabet}" for alphabet in EVALUATED)
    part = compare("omniglot", SHORT, list(range(2 if quick else 5)), n_processes, quick, tasks)
    part["n_classes"] = {task: len(source_of(task, "new").classes) for task in tasks}
    part["differences"] = differences(part)
    print_comparison(part)
    return part, [size_gate(part, "M4 omniglot")]


def print_comparison(part: Part) -> None:
    """The table for a terminal."""
    print(f"\n{part['dataset']}: {', '.join(part['tasks'])}; {len(part['seeds'])} seeds")
    print(f"  {'arm':<28}{'accuracy, 95 % interval':>26}{'lr':>9}{'trained':>10}{'CPU s':>8}   {OURS} minus it")
    for row in part["rows"]:
        value, other = row["accuracy"], part.get("differences", {}).get(f"{OURS} - {row['arm']}")
        seen = f"{100 * value['mean']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}] %"
        print(
            f"  {row['arm']:<28}{seen:>26}{row['lr']:>9g}{row['trainable_parameters']:>10,}{row['cpu_seconds']:>8.1f}"
            f"   {points(other) if other else ''}"
        )


# --- M8 ----------------------------------------------------------------------------------------------------------


def run_transfer(job: Job) -> dict[str, Any]:
    """The upright digits in full, then the same digits upside down from few images; accuracy on the second."""
    first, second = task_of("digits"), few_of(task_of("digits", job.on_valid, quarter_turns=2), N_FEW, job.seed)
    assert first.train is not None
    assert second.train is not None
    learner = make(OURS, backbone_of("digits", job.seed), len(first.train), job.seed, 1e-2, extend=job.arm == "extension")
    fit(learner, first)
    # the second task's own number of passes and rate
    learner.epochs, learner.lr = round(FEW_STEPS * 64 / len(second.train)), job.lr
    fit(learner, second)
    return {"accuracy": accuracy(learner, second.test, second.name)}


def transfer_part(quick: bool, n_processes: int) -> tuple[Part, list[Gate]]:
    """M8: extension (the second task reads the first's tokens) against concatenation; no sign is promised."""
    arms, seeds = ("extension", "concatenation"), list(range(2 if quick else 10))
    rates = (1e-2,) if quick else RATES
    tuning = [Job("digits", arm, TUNING_SEED, lr, on_valid=True) for arm in arms for lr in rates]
    valid = {job: result["accuracy"] for job, result in run_jobs(tuning, n_processes, run_transfer).items()}
    best = {arm: max((job for job in tuning if job.arm == arm), key=valid.__getitem__).lr for arm in arms}
    jobs = [Job("digits", arm, seed, best[arm]) for arm in arms for seed in seeds]
    found = run_jobs(jobs, n_processes, run_transfer)
    values = {arm: [found[job]["accuracy"] for job in jobs if job.arm == arm] for arm in arms}
    part = {
        "tasks": "digits 5-9 upright (all train images), then turned by 180 degrees (20 images a class)", "seeds": seeds,
        "tuning": {f"{job.arm} {job.lr:g}": value for job, value in valid.items()}, "lr": best,
        "rows": {arm: summary(values[arm]) for arm in arms},
        "extension - concatenation": paired(values["extension"], values["concatenation"]),
    }  # fmt: skip
    print(f"\nM8 extension - concatenation: {points(part['extension - concatenation'])}, n {len(seeds)}")  # type: ignore[arg-type]
    return part, []


# --- M9 ----------------------------------------------------------------------------------------------------------


def start_part(quick: bool, n_processes: int) -> tuple[Part, list[Gate]]:
    """M9: where memory enters the layer, and what the class token begins as; each tuned by itself."""
    part = compare("digits", STARTS, list(range(2 if quick else 10)), n_processes, quick)
    ours = "pre-norm, copy"
    part["differences"] = {f"{ours} - {other}": paired(values_of(part, ours), values_of(part, other)) for other in STARTS if other != ours}
    print_comparison(part)
    gates = []
    for name, value in part["differences"].items():
        print(f"  {name}: {points(value)}")
        if not quick:
            seen = f"{points(value)}, one-sided upper bound {100 * value['one_sided_high']:+.1f}"
            gates.append(Gate("M9", f"{name}: not worse (one-sided 95 % upper bound >= 0)", seen, value["one_sided_high"] >= 0))
    return part, gates
