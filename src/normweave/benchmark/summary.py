"""Compare the methods of a plan over all its sets of test images: the last block of a table.

A set is a data set, a protocol and a side (seen or unseen subclasses). Each counts once, whatever its number of images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from normweave.benchmark.plan import Plan
from normweave.report.metrics import binomial_interval

ALL_DATA = "(all)"
"""In the place of the data set, in the rows of the summary."""
RATE = "false_alarm_rate"
SUMMARISED = {"image_auroc": "Image AUROC", "pixel_auroc": "Pixel AUROC", "aupro": "AUPRO", RATE: "False alarms"}
"""Metrics of the summary and their headings."""
NEAR = 0.01
"""Methods this close to the best one, or to the promised false-alarm rate, are counted as near: one point."""

Result = dict[str, Any]
Set = tuple[str, str, str]
"""Data set, protocol and side."""
Runs = Mapping[str, Sequence[Result]]
"""The runs of a data set and protocol by method, in the order of the plan, the failed ones among them."""


class Summary(NamedTuple):
    """The methods over all sets."""

    rows: list[dict[str, Any]]
    """One for each method: see `summarise`."""
    left_out: dict[str, dict[str, list[str]]]
    """By metric: the names of the sets that do not count, each with the methods that lack a value."""
    failed_folds: list[str]
    """The names of folds in which every run failed, or that could not be made: they count for no method."""


def summarise(plan: Plan, results: Sequence[Result]) -> Summary | None:
    """Return the comparison over all sets; None for results of fewer than two sets.

    The value of a method on a set is the mean over the seeds of its mean over the folds. It is missing if a run of the
    method failed, or has no value, in a fold in which any method has one: otherwise the mean would leave out the
    difficult folds. A metric is compared over the sets on which no compared method lacks it; a method without a value
    on any set is not compared.

    Each row has for each metric NAME:

    NAME: mean over the compared sets.
    NAME_worst, NAME_worst_set: largest distance to the best method of a set, and that set. For false alarms the largest
        excess over the promised rate: a rate below it is not better.
    NAME_near: number of the sets on which that distance is at most one point.
    NAME_sets, NAME_lacking: number of the compared sets, and of all sets on which this method has no value.

    False alarms also have the rate pooled over all good test images of the compared sets, over folds and seeds
    (`false_alarm_rate_pooled`), its 95 % interval (`_low`, `_high`) and the mean of the promised rates (`_promised`).
    The interval is that of as many trials as there are different groups of images (`_groups`), because images of one
    group are not independent, nor are the tests of an image in several folds and seeds.
    """
    by_data: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for item in plan.data:
        for protocol in item.protocols:
            own = [result for result in results if (result["data"], result["protocol"]) == (item.name, protocol)]
            by_data[item.name, protocol] = {
                method.name: [result for result in own if result["method"] == method.name] for method in plan.methods
            }
    runs: dict[Set, Runs] = {
        (*where, side): by_method
        for where, by_method in by_data.items()
        for side in sorted({side for own in by_method.values() for result in own for side in result.get("sides", ())})
    }
    if len(runs) < 2:
        return None
    rows: list[dict[str, Any]] = [
        {"data": ALL_DATA, "protocol": None, "side": None, "method": method.name} for method in plan.methods
    ]
    left_out = {}
    for metric in SUMMARISED:
        values = {one: _values(by_method, one[2], metric) for one, by_method in runs.items()}
        compared = [row["method"] for row in rows if any(value[row["method"]] is not None for value in values.values())]
        lacking = {one: [name for name in compared if value[name] is None] for one, value in values.items()}
        common = [one for one in runs if compared and not lacking[one]]
        left_out[metric] = {set_name(one): names for one, names in lacking.items() if names}
        for row in rows:
            name = row["method"]
            row |= _compared(metric, {one: values[one] for one in common}, {one: runs[one] for one in common}, name)
            row[f"{metric}_lacking"] = sum(value[name] is None for value in values.values())
            if metric == RATE:
                row |= _pooled({one: runs[one][name] for one in common} if name in compared else {})
    return Summary(rows, left_out, _failed_folds(results))


def set_name(one: Set) -> str:
    """Return the name of a set in the tables."""
    data, protocol, side = one
    return f"{data}: {protocol}, {side}"


def _values(runs: Runs, side: str, metric: str) -> dict[str, float | None]:
    """Return the value of each method on a set; None: missing."""
    by_run = {
        name: [(result["fold"], result["seed"], _value(result, side, metric)) for result in own]
        for name, own in runs.items()
    }
    folds = {fold for own in by_run.values() for fold, _, value in own if value is not None}
    values: dict[str, float | None] = {}
    for name, own in by_run.items():
        by_seed: dict[int, list[float | None]] = defaultdict(list)
        for fold, seed, value in own:
            if fold in folds:
                by_seed[seed].append(value)
        complete = {seed: [one for one in found if one is not None] for seed, found in by_seed.items()}
        whole = bool(by_seed) and complete == by_seed
        values[name] = mean(mean(found) for found in complete.values()) if whole else None
    return values


def _value(result: Result, side: str, metric: str) -> float | None:
    table = result.get("sides", {}).get(side, {})
    if metric == RATE and ("promised" not in result or "good_groups" not in table):  # a result of an older version
        return None
    value: float | None = table.get(metric)
    return value


def _promised(result: Result, side: str) -> float:
    """Return the promised false-alarm rate of the images of a side."""
    rate: float = result.get("sides", {}).get(side, {}).get("promised", result["promised"])
    return rate


def _compared(
    metric: str, values: Mapping[Set, Mapping[str, float | None]], runs: Mapping[Set, Runs], name: str
) -> dict[str, Any]:
    """Return mean, worst and near of a method over the compared sets; None for a method without values."""
    own: dict[Set, float] = {one: value for one in values if (value := values[one][name]) is not None}
    row: dict[str, Any] = {f"{metric}{key}": None for key in ("", "_worst", "_worst_set", "_near")}
    row[f"{metric}_sets"] = len(values)
    if not own:
        return row
    distances = {}
    for one, value in own.items():
        if metric == RATE:
            promised = mean(_promised(result, one[2]) for result in runs[one][name] if "promised" in result)
            distances[one] = max(0.0, value - promised)
        else:
            distances[one] = max(other for other in values[one].values() if other is not None) - value
    worst = max(distances, key=lambda one: distances[one])
    return row | {
        metric: mean(own.values()),
        f"{metric}_worst": distances[worst],
        f"{metric}_worst_set": set_name(worst),
        f"{metric}_near": sum(distance <= NEAR + 1e-9 for distance in distances.values()),
    }


def _pooled(runs: Mapping[Set, Sequence[Result]]) -> dict[str, Any]:
    """Return the pooled false-alarm rate of a method over these sets."""
    alarms = promised = 0.0
    images = 0
    groups = set()
    for (data, _, side), own in runs.items():
        for result in own:
            if (rate := _value(result, side, RATE)) is not None:
                table = result["sides"][side]
                images += table["n_normal"]
                alarms += rate * table["n_normal"]
                promised += _promised(result, side) * table["n_normal"]
                groups |= {(data, group) for group in table["good_groups"]}
    if not images:
        return {f"{RATE}_{key}": None for key in ("pooled", "low", "high", "groups", "promised")}
    rate = alarms / images
    low, high = binomial_interval(rate * len(groups), len(groups))
    return {
        f"{RATE}_pooled": rate,
        f"{RATE}_low": low,
        f"{RATE}_high": high,
        f"{RATE}_groups": len(groups),
        f"{RATE}_promised": promised / images,
    }


def _failed_folds(results: Sequence[Result]) -> list[str]:
    succeeded: dict[str, bool] = {}
    for result in results:
        name = f"{result['data']}: {result['protocol']}, {result['fold']}"
        succeeded[name] = succeeded.get(name, False) or "error" not in result
    return [name for name, any_did in succeeded.items() if not any_did]
