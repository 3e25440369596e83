"""Tables and gates of facts.py, from the rows of all seeds.

Rows are facts; intervals come from a bootstrap over facts within seeds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from facts_runs import LEVEL, WINDOWS, method_name
from facts_world import EXPOSURES, KINDS
from scipy.stats import spearmanr

from remanence.probes.retention import half_life, retention
from remanence.probes.statistics import Interval, cluster_bootstrap, partial_spearman

HELD_OUT_TOLERANCE = 0.005
SHOWN = (
    "log_p_before", "log_p", "log_s_mem", "log_s_prime", "priming_median", "priming_dp", "priming_flip", "cross_priming", "drift",
    "paraphrase_median", "share_tiny",
)  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """One claim: what it says, what was found, whether it holds; `is_gated` False for what is only reported."""

    row: str
    criterion: str
    seen: str
    holds: bool
    is_gated: bool = True

    @property
    def passed(self) -> bool:
        return self.holds or not self.is_gated

    def __str__(self) -> str:
        word = ("holds" if self.holds else "FAILS") if self.is_gated else f"reported ({'holds' if self.holds else 'does not hold'})"
        return f"{self.row:<4}{word:<26}{self.criterion}: {self.seen}"


def shown(value: Interval) -> str:
    """An interval for a table."""
    return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def difference(table: pd.DataFrame, column: str, first: str, second: str, by: str = "kind") -> Interval:
    """Median of one kind minus that of another."""
    chosen = table[table[by].isin([first, second])].dropna(subset=[column])

    def statistic(values: Any, kinds: Any) -> float:
        return float(np.median(values[kinds == first]) - np.median(values[kinds == second]))

    return cluster_bootstrap((chosen[column], chosen[by]), chosen["seed"], statistic, strata=chosen[by])


def median(table: pd.DataFrame, column: str) -> Interval:
    """Median over facts."""
    return cluster_bootstrap(table[column], table["seed"], np.median)


def of(rows: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """The rows of an experiment, without columns that it does not have."""
    return rows[rows["experiment"] == experiment].dropna(axis=1, how="all")


# --- what is measured --------------------------------------------------------------------------------------------


def injected(rows: pd.DataFrame) -> pd.DataFrame:
    """Every fact right after its last exposure, with its forecast and its retention at the end."""
    curve = of(rows, "curve")
    end = curve[(curve["run"] != "control") & (curve["step"] == EXPOSURES)]
    before = of(rows, "forecast")[["seed", "fact", "context_loss", "text_loss", "entropy", "length", "surprising"]]
    return end.merge(before, on=["seed", "fact"]).merge(_retained(curve), on=["seed", "fact"], how="left")


def _retained(curve: pd.DataFrame) -> pd.DataFrame:
    """rho at the last step, the half-life, and the absolute log-probability there."""
    later = curve[curve["step"] >= EXPOSURES]
    wide = later.pivot_table(index=["seed", "fact"], columns=[later["run"].eq("control"), "step"], values="log_p")
    run, control = wide[False].dropna(), wide[True]
    control = control.loc[run.index, run.columns]
    known = curve[(curve["run"] != "control") & (curve["step"] == EXPOSURES)].set_index(["seed", "fact"])["log_p_before"]
    rho = retention(run.to_numpy(), control.to_numpy(), known.loc[run.index].to_numpy())
    steps = run.columns.to_numpy() - EXPOSURES
    found = {"rho": rho[:, -1], "half_life": half_life(steps, rho), "log_p_end": run.iloc[:, -1]}
    return pd.DataFrame(found, index=run.index).reset_index()


def at_level(rows: pd.DataFrame, column: str = "log_p", level: float = LEVEL) -> pd.DataFrame:
    """Priming of every fact and way of learning where its memory first reaches `level`, linear between measurements; NaN if never."""
    found = []
    for (seed, fact, variant), curve in of(rows, "exposed").groupby(["seed", "fact", "variant"]):
        memory, priming = curve[column].to_numpy(), curve["priming_median"].to_numpy()
        reached = np.flatnonzero(memory >= level)
        value = math.nan
        if len(reached):
            at = reached[0]
            share = 1.0 if at == 0 else (level - memory[at - 1]) / (memory[at] - memory[at - 1])
            value = float(priming[at] if at == 0 else priming[at - 1] + share * (priming[at] - priming[at - 1]))
        found.append({"seed": seed, "fact": fact, "variant": variant, "priming_median": value})
    return pd.DataFrame(found)


def paired(table: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Priming of the same facts in two ways of learning, side by side."""
    wide = table.pivot_table(index=["seed", "fact"], columns="variant", values="priming_median").reset_index()
    both = wide[["seed", "fact", first, second]].dropna() if {first, second} <= set(wide) else wide.iloc[:0]
    return both.rename(columns={first: "first", second: "second"})


def ratio_of_medians(first: Any, second: Any) -> float:
    """Share of the second's median that the first has less."""
    return 1.0 - float(np.median(first) / np.median(second))


# --- gates -------------------------------------------------------------------------------------------------------


def all_gates(rows: pd.DataFrame, chosen: tuple[float, bool]) -> list[Gate]:
    """G0 to G8; G9 is in the test suite."""
    table = injected(rows)
    return [
        *_world(rows), *_memory(table), *_order(table), *_forecast(table), *_retention(table), *_erasure(rows, chosen),
        *_dilution(rows), *_stones(rows), *_nulls(rows), *_compared(rows),
    ]  # fmt: skip


def _world(rows: pd.DataFrame) -> list[Gate]:
    known = of(rows, "world")["known"]
    return [Gate("G0", "mean probability of the world's answers >= 0.8, every seed", f"least {known.min():.3f}", bool(known.min() >= 0.8))]


def _memory(table: pd.DataFrame) -> list[Gate]:
    outlandish = table[table["kind"] == "outlandish"]
    gain, level = median(outlandish, "log_s_mem"), median(outlandish, "log_p")
    holds = gain.mean >= 2 and level.mean >= math.log(0.1)
    return [Gate("G1", "outlandish: log_s_mem >= 2, log_p >= log 0.1", f"{shown(gain)}, {shown(level)}", holds)]


def _order(table: pd.DataFrame) -> list[Gate]:
    gates = []
    value = difference(table, "priming_median", "outlandish", "mundane")
    gates.append(Gate("G2", "priming: outlandish - mundane > 0", shown(value), value.low > 0))
    outlandish = table[table["kind"] == "outlandish"]
    for control in ("drift", "cross_priming"):
        value = median(outlandish.assign(gap=outlandish["priming_median"] - outlandish[control]), "gap")
        gates.append(Gate("G2", f"outlandish: priming - {control} > 0", shown(value), value.low > 0))
    value = difference(table, "priming_median", "outlandish", "scrambled")
    return [*gates, Gate("G2", "priming: outlandish - scrambled > 0", shown(value), value.low > 0, is_gated=False)]


def _forecast(table: pd.DataFrame) -> list[Gate]:
    plain = table[table["kind"] != "scrambled"]
    value = _correlation(plain)
    gates = [Gate("G3", "Spearman(log P before, priming) <= -0.4", shown(value), value.mean <= -0.4 and value.high < 0)]
    pooled = _correlation(table)
    gates.append(Gate("G3", "the same with scrambled texts", shown(pooled), pooled.high < 0, is_gated=False))
    for name, column, data in (("theme's log P", "theme_log_p_before", plain), ("context loss, with scrambled", "context_loss", table)):
        columns = (data["log_p_before"], data["priming_median"], data[column])
        value = cluster_bootstrap(columns, data["seed"], partial_spearman)
        gates.append(Gate("G3", f"partial correlation, given the {name}", shown(value), value.high < 0, is_gated=False))
    return gates


def _correlation(table: pd.DataFrame) -> Interval:
    columns = (table["log_p_before"], table["priming_median"])
    return cluster_bootstrap(columns, table["seed"], lambda x, y: float(spearmanr(x, y).statistic))


def _retention(table: pd.DataFrame) -> list[Gate]:
    learned = table.dropna(subset=["rho"])
    counts = learned["kind"].value_counts()
    gates = []
    for other, is_gated in (("mundane", True), ("scrambled", False)):
        value = difference(learned, "rho", "outlandish", other)
        found = f"{shown(value)}; learned: {counts.get('outlandish', 0)} and {counts.get(other, 0)} facts"
        gates.append(Gate("G4", f"retention of outlandish - {other}: above 0", found, value.low > 0, is_gated))
    value = difference(table, "log_p_end", "outlandish", "mundane")
    gates.append(Gate("G4", "absolute log_p at the end: outlandish - mundane < 0", shown(value), value.high < 0, is_gated=False))
    return gates


def _erasure(rows: pd.DataFrame, chosen: tuple[float, bool]) -> list[Gate]:
    erased = of(rows, "erased").set_index("method")
    whole = erased.loc["injected"].reset_index()
    gates = []
    options = {chosen: True, (0.08, False): False, (chosen[0], not chosen[1]): False}
    for option, is_gated in options.items():
        name = method_name("ignore_top", *option)
        both = whole.merge(erased.loc[name].reset_index(), on=["seed", "fact"], suffixes=("", "_left"))
        found, holds = [], []
        for column, least in (("priming_median", 0.75), ("log_s_mem", 0.5)):
            value = cluster_bootstrap((both[f"{column}_left"], both[column]), both["seed"], ratio_of_medians)
            found.append(f"{column} {shown(value)}")
            holds.append(value.mean >= least)
        gates.append(Gate("G5", f"{name} removes >= 0.75 of priming, >= 0.5 of memory", "; ".join(found), all(holds), is_gated))
    losses = of(rows, "trains on").pivot_table(index=["seed", "group"], columns="from", values="held_out")
    worst = float((losses["erased"] / losses["before"] - 1).abs().max())
    return [*gates, Gate("G5", "100 clean steps later the loss is within 0.5 %", f"worst {100 * worst:.2f} %", worst <= HELD_OUT_TOLERANCE)]


def _dilution(rows: pd.DataFrame) -> list[Gate]:
    table, gates = at_level(rows), []
    for every in WINDOWS:
        both = paired(table, f"every {every}", "plain")
        if both.empty:
            gates.append(Gate("G6", f"ignore-top every {every} steps", "memory never reached", False))
            continue
        value = median(both.assign(gap=both["first"] - both["second"]), "gap")
        found = f"priming minus plain's {shown(value)} at P = 0.5, {len(both)} facts"
        gates.append(Gate("G6", f"ignore-top every {every} steps: frontier not worse", found, value.low <= 0))
    return gates


def _stones(rows: pd.DataFrame) -> list[Gate]:
    asked = of(rows, "stone").pivot_table(index=["seed", "fact"], columns="variant", values="log_p_before").reset_index()
    rise = median(asked.assign(gap=asked["stone"] - asked["filler"]), "gap")
    gates = [Gate("G7", "a stone raises P before >= 10 times over filler", f"log ratio {shown(rise)}", rise.mean >= math.log(10))]
    for column, words in (("own_log_p", "its own words"), ("log_p", "the plain words")):
        table = at_level(rows, column)
        for rival in ("plain", "filler", "rewrite"):
            both = paired(table, "stone", rival)
            is_gated = column == "own_log_p" and rival == "plain"
            if both.empty:
                gates.append(Gate("G7", f"stone against {rival} at P = 0.5 after {words}", "memory never reached", False, is_gated))
                continue
            value = cluster_bootstrap((both["first"], both["second"]), both["seed"], ratio_of_medians)
            found = f"share of priming saved {shown(value)}, {len(both)} facts"
            gates.append(Gate("G7", f"stone against {rival} at P = 0.5 after {words}: >= 0.3", found, value.mean >= 0.3, is_gated))
    return gates


def _nulls(rows: pd.DataFrame) -> list[Gate]:
    nothing = of(rows, "nothing")
    unequal = nothing[~nothing["equal"].astype(bool)]["case"].unique().tolist()
    gates = [Gate("G8", "no exposures, and both ends of a sparse update: bit-identical", f"unequal: {unequal or 'none'}", not unequal)]
    curve = of(rows, "curve")
    control = curve[(curve["run"] == "control") & (curve["step"] == EXPOSURES)]
    value = median(control.assign(gap=control["priming_median"] - control["drift"]), "gap")
    gates.append(Gate("G8", "never injected: priming - drift contains 0", shown(value), value.low <= 0 <= value.high))
    permuted = of(rows, "permuted")
    value = _correlation(permuted[permuted["kind"] != "scrambled"])
    return [*gates, Gate("G8", "keywords permuted: the forecast's correlation contains 0", shown(value), value.low <= 0 <= value.high)]


def _compared(rows: pd.DataFrame) -> list[Gate]:
    erased = of(rows, "erased")
    gates = []
    for rival in ("gradient ascent", "gradient difference", "clean fine-tuning"):
        both = paired(
            erased[erased["method"].isin(["compared: sparse", f"compared: {rival}"])].rename(columns={"method": "variant"}),
            "compared: sparse", f"compared: {rival}",
        )  # fmt: skip
        value = median(both.assign(gap=both["first"] - both["second"]), "gap")
        gates.append(Gate("E4", f"priming left: sparse - {rival} < 0 at equal memory", shown(value), value.high < 0, is_gated=False))
    return gates


# --- tables ------------------------------------------------------------------------------------------------------


def tables(rows: pd.DataFrame, tuning: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Everything that the gates are drawn from, by name."""
    return {
        "kinds": _kinds(injected(rows)),
        "sparse updates": _grouped(of(rows, "erased"), lambda name: not name.startswith("compared")),
        "erasers at equal memory": _grouped(of(rows, "erased"), lambda name: name.startswith("compared")),
        "sparse updates on the tuning seed": _grouped(of(tuning, "erased"), lambda _: True),
        "priming at P = 0.5": _levels(rows),
        "held-out loss": of(rows, "held-out").groupby(["run", "step"])["held_out"].mean().reset_index().to_dict("records"),
    }


def _kinds(table: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for kind in KINDS:
        part = table[table["kind"] == kind]
        values = {column: shown(median(part, column)) for column in (*SHOWN, "context_loss", "log_p_end")}
        learned = part.dropna(subset=["rho"])
        rho = shown(median(learned, "rho")) if len(learned) else "not learned"
        half = learned["half_life"].median() if len(learned) else math.nan
        quartiles = part["log_p_before"].quantile([0.0, 0.25, 0.5, 0.75, 1.0]).round(2).tolist()
        line = {"kind": kind, **values, "rho": rho, "n_learned": len(learned), "half_life": half}
        found.append({**line, "log_p_before_quartiles": quartiles})
    return found


def _grouped(table: pd.DataFrame, keep: Callable[[str], bool]) -> list[dict[str, Any]]:
    chosen = table[table["method"].map(keep)]
    wanted = ("log_p", "log_s_mem", "priming_median", "known", "held_out", "relearning_steps", "steps")
    columns = [name for name in wanted if name in chosen]
    found = chosen.groupby("method", sort=False)[columns].median()
    return found.round(4).reset_index().to_dict("records")


def _levels(rows: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for column in ("log_p", "own_log_p"):
        for variant, part in at_level(rows, column).groupby("variant"):
            reached = part.dropna()
            value = shown(median(reached, "priming_median")) if len(reached) else "-"
            found.append({"memory": column, "learned": variant, "priming": value, "reached": f"{len(reached)} of {len(part)}"})
    return found


def print_tables(found: dict[str, list[dict[str, Any]]]) -> None:
    """All tables for a terminal."""
    for name, lines in found.items():
        frame = pd.DataFrame(lines)
        print(f"\n{name}\n{(frame.set_index('kind').T if 'kind' in frame else frame).to_string()}")
    print()
