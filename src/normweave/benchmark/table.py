"""Tables of the results of a plan, as Markdown, HTML, CSV and Parquet."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from normweave import __version__
from normweave.atomic import write_atomically
from normweave.benchmark.plan import MethodPlan, Plan
from normweave.benchmark.summary import NEAR, RATE, SUMMARISED, Summary, summarise
from normweave.report.html import render
from normweave.report.metrics import sign_flip_p_value

METRICS = (
    "image_auroc",
    "pixel_auroc",
    "aupro",
    "image_ap",
    "image_f1max",
    "pixel_ap",
    "false_alarm_rate",
    "unknown_rate",
)
OVER_GENERALISATION = ("d_normal", "d_abnormal", "ratio", "cell_auroc")
CHANGES = ("ratio", "cell_auroc")
"""Metrics whose change against the baseline of the method is shown."""
COMPARED = ("image_auroc", "pixel_auroc")
"""Metrics whose difference to the baseline is tested for significance."""
COSTS = ("train_s", "test_ms", "inference_ms", "peak_mib", "parameters")
"""Costs of a run. Results of older versions do not have all of them."""
POOLED, MEAN = "(pooled)", "(mean)"
"""Names of two further rows: all test images together, and the mean over the categories."""


class Column(NamedTuple):
    """A number of each row and its format."""

    heading: str
    name: str
    scale: float = 100
    style: str = ".1f"


POOLED_COLUMNS = (
    Column("I-AUROC", "image_auroc"),
    Column("p", "image_auroc_p", 1, ".2g"),
    Column("P-AUROC", "pixel_auroc"),
    Column("p", "pixel_auroc_p", 1, ".2g"),
    Column("AUPRO", "aupro"),
    Column("AP (image)", "image_ap"),
    Column("FAR", "false_alarm_rate"),
    Column("unknown", "unknown_rate"),
    Column("train s", "train_s", 1, ".0f"),
    Column("ms/image", "inference_ms", 1, ".0f"),
    Column("MiB", "peak_mib", 1, ".0f"),
    Column("M parameters", "parameters", 1e-6, ".2f"),
)
CATEGORY_COLUMNS = (
    Column("I-AUROC", "image_auroc"),
    Column("P-AUROC", "pixel_auroc"),
    Column("AUPRO", "aupro"),
    Column("FAR", "false_alarm_rate"),
    Column("d normal", "d_normal", 1, ".3f"),
    Column("d abnormal", "d_abnormal", 1, ".3f"),
    Column("ratio", "ratio", 1, ".2f"),
    Column("cell AUROC", "cell_auroc"),
)
CHANGE_COLUMNS = (
    Column("Δ ratio", "ratio_change", 1, "+.2f"),
    Column("Δ cell AUROC", "cell_auroc_change", 100, "+.1f"),
)

Result = dict[str, Any]
"""Result of a run: metrics of seen and unseen subclasses (`sides`) and costs, or the reason of a failure (`error`)."""


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_rows(plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows of the table: the mean over the folds of each seed, then mean and std over the seeds."""
    rows = []
    for item in plan.data:
        for protocol in item.protocols:
            by_method = {
                method.name: [
                    result
                    for result in results
                    if (result["data"], result["protocol"], result["method"]) == (item.name, protocol, method.name)
                    and "error" not in result
                ]
                for method in plan.methods
            }
            for method in plan.methods:
                own, base = by_method[method.name], by_method.get(method.baseline, [])
                other = plan.baseline_of(method)
                reference = [] if other == method.name else by_method[other]
                for side in sorted({side for result in own for side in result["sides"]}):
                    start = {"data": item.name, "protocol": protocol, "side": side, "method": method.name}
                    categories = _categories(own, side)
                    if len(categories) < 2:
                        rows.append(start | _row(own, side) | _significance(own, reference, side))
                        continue
                    for category in (POOLED, MEAN, *categories):
                        numbers = _row(own, side, category) | _over_generalisation(own, base, side, category)
                        tested = _significance(own, reference, side, category)
                        rows.append(start | {"category": category} | numbers | tested)
    return rows


def failures(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each method and reason of failed runs."""
    keys = ("data", "protocol", "method", "error")
    counted = Counter(tuple(result[key] for key in keys) for result in results if "error" in result)
    return [
        dict(zip(keys, reason, strict=True)) | {"side": None, "failed_runs": count} for reason, count in counted.items()
    ]


def _categories(results: Sequence[Result], side: str) -> list[str]:
    return sorted({name for result in results for name in result["sides"][side]["by_category"]})


def _row(results: Sequence[Result], side: str, category: str = POOLED) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len({result["seed"] for result in results})}
    for name in METRICS:
        row |= _summary(name, _by_seed(results, side, category, name))
    for name in COSTS:
        known = [result[name] for result in results if result.get(name) is not None]
        row[name] = mean(known) if known else None
    return row


def _over_generalisation(
    results: Sequence[Result], baseline: Sequence[Result], side: str, category: str
) -> dict[str, Any]:
    """Return the metrics, and the change of two of them against the runs of the baseline with the same seeds."""
    row: dict[str, Any] = {}
    for name in OVER_GENERALISATION:
        row |= _summary(name, _by_seed(results, side, category, name))
    for name in CHANGES:
        own, base = (_by_seed(runs, side, category, name) for runs in (results, baseline))
        row |= _summary(f"{name}_change", {seed: own[seed] - base[seed] for seed in own if seed in base})
    return row


def _significance(
    own: Sequence[Result], reference: Sequence[Result], side: str, category: str = POOLED
) -> dict[str, Any]:
    """Return mean difference, p-value and number of pairs of seed, fold and subclass for each compared metric."""
    row: dict[str, Any] = {}
    for name in COMPARED:
        values, others = (_by_subclass(runs, side, category, name) for runs in (own, reference))
        differences = [values[pair] - others[pair] for pair in sorted(values.keys() & others.keys())]
        row[f"{name}_difference"] = mean(differences) if differences else None
        row[f"{name}_p"] = sign_flip_p_value(differences)
        row[f"{name}_pairs"] = len(differences)
    return row


def _by_subclass(results: Sequence[Result], side: str, category: str, name: str) -> dict[tuple[int, str, str], float]:
    """Return the defined values by seed, fold and subclass."""
    return {
        (result["seed"], result["fold"], subclass): table[name]
        for result in results
        for subclass, table in result["sides"].get(side, {}).get("by_subclass", {}).items()
        if table.get(name) is not None
        and (category in (POOLED, MEAN) or subclass == category or subclass.startswith(f"{category}/"))
    }


def _by_seed(results: Sequence[Result], side: str, category: str, name: str) -> dict[int, float]:
    """Return a metric for each seed: its mean over the folds in which it is defined."""
    if category == MEAN:
        parts = [_by_seed(results, side, one, name) for one in _categories(results, side)]
        return {
            seed: mean(part[seed] for part in parts if seed in part)
            for seed in sorted({seed for part in parts for seed in part})
        }
    found = defaultdict(list)
    for result in results:
        table = result["sides"][side]
        if category != POOLED:
            table = table["by_category"].get(category, {})
        if name in OVER_GENERALISATION:
            table = table.get("over_generalisation") or {}
        if (value := table.get(name)) is not None:
            found[result["seed"]].append(value)
    return {seed: mean(values) for seed, values in sorted(found.items())}


def _summary(name: str, by_seed: Mapping[int, float]) -> dict[str, float | None]:
    values = list(by_seed.values())
    return {
        name: mean(values) if values else None,
        f"{name}_sd": stdev(values) if len(values) > 1 else None,
    }


# ── Markdown and HTML ────────────────────────────────────────────────────────────────────────────────────────────────


class Part(NamedTuple):
    """A heading of level 2 or 3, with or without a table."""

    heading: str
    level: int
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: Sequence[str] = ()


class Figure(NamedTuple):
    """An image file with a caption."""

    path: Path
    caption: str

    @property
    def of_images(self) -> bool:
        """Whether it contains images of the data set, whose license may forbid publication."""
        return self.path.suffix == ".jpg"


def markdown(
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    results: Sequence[Result],
    provenance: Sequence[str],
    figures: Sequence[Figure] = (),
) -> str:
    """Return the tables as Markdown, with links to the figures without images of the data set."""
    text = [f"# {plan.title}", "", *provenance, ""]
    for paragraph in _legend(plan, rows):
        text += [paragraph, ""]
    for part in _parts(plan, rows, results):
        text += [f"{'#' * part.level} {part.heading}", ""]
        for paragraph in part.text:
            text += [paragraph, ""]
        if part.heads:
            text += [_piped(part.heads), _piped(["---"] * len(part.heads))]
            text += [_piped(line) for line in part.rows]
            text.append("")
    if charts := [figure for figure in figures if not figure.of_images]:
        text += ["## Figures", ""]
        for figure in charts:
            text += [
                f"![{figure.path.stem}]({figure.path.parent.name}/{figure.path.name})",
                "",
                figure.caption,
                "",
            ]
    return "\n".join(text).rstrip("\n") + "\n"


def _piped(cells: Sequence[str]) -> str:
    # a bar or a line break would end the cell
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def html(
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    results: Sequence[Result],
    provenance: Sequence[str],
    figures: Sequence[Figure] = (),
) -> str:
    """Return the tables and figures as a page that loads nothing else."""
    parts = [
        part._asdict() | {"rows": [(line[0], None, line[1:]) for line in part.rows]}
        for part in _parts(plan, rows, results)
    ]
    return render(
        "benchmark.html",
        title=plan.title,
        version=__version__,
        provenance=provenance,
        legend=list(_legend(plan, rows)),
        parts=parts,
        figures=figures,
    )


def _parts(plan: Plan, rows: Sequence[dict[str, Any]], results: Sequence[Result]) -> Iterator[Part]:
    further = CATEGORY_COLUMNS + (CHANGE_COLUMNS if any(m.baseline for m in plan.methods) else ())
    for data, protocol, side in dict.fromkeys((row["data"], row["protocol"], row["side"]) for row in rows):
        heading = f"{data}: {protocol}, {side} subclasses"
        own = [row for row in rows if (row["data"], row["protocol"], row["side"]) == (data, protocol, side)]
        categories = list(dict.fromkeys(row.get("category") for row in own))
        if categories != [None]:
            yield Part(heading, 2)
        for category in categories:
            columns = POOLED_COLUMNS if category in (None, POOLED) else further
            chosen = [row for row in own if row.get("category") == category]
            yield Part(
                heading if category is None else category,
                2 if category is None else 3,
                ["method", *(column.heading for column in columns)],
                [[row["method"], *(_written(row, column) for column in columns)] for row in chosen],
            )
    if differs := {result["method"]: result["differs"] for result in results if result.get("differs")}:
        yield Part(
            "Other methods, and how they differ from the published version",
            2,
            ["method", "difference"],
            list(differs.items()),
        )
    if failed := [result for result in results if "error" in result]:
        keys = ("method", "data", "protocol", "fold")
        seeds: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for result in failed:
            seeds[*(result[key] for key in keys), result["error"]].append(str(result["seed"]))
        lines = [[*where, ", ".join(own), reason] for (*where, reason), own in seeds.items()]
        yield Part("Failed runs", 2, [*keys, "seeds", "reason"], lines)
    if (summary := summarise(plan, results)) is not None:
        yield from _summary_parts(summary)


def _summary_parts(summary: Summary) -> Iterator[Part]:
    text = [
        "A set is a data set, a protocol and a side (seen or unseen subclasses). It counts once: the mean over the "
        "seeds of the mean over the folds. mean: over the sets on which every compared method has a value; the value "
        "of a method is missing where one of its runs failed and another method's did not. worst: largest distance to "
        f"the best method of a set, in points, and that set. near: sets within {100 * NEAR:.0f} point of the best "
        "method. lacking: sets on which the method has no value. A method without any value is not compared.",
    ]
    if summary.failed_folds:
        text.append(f"Without a result of any method, and so in no mean: {'; '.join(summary.failed_folds)}.")
    yield Part("Over all data sets", 2, text=text)
    for metric, heading in SUMMARISED.items():
        notes = []
        if left := summary.left_out[metric]:
            sets = "; ".join(f"{name} (no value of {', '.join(methods)})" for name, methods in left.items())
            notes.append(f"Left out: {sets}.")
        columns = [
            Column("mean", metric),
            Column("worst", f"{metric}_worst"),
            Column("near", f"{metric}_near", 1, ".0f"),
            Column("lacking", f"{metric}_lacking", 1, ".0f"),
        ]
        if metric == RATE:
            notes.insert(
                0,
                "Share of good test images above the threshold. worst and near: the excess over the promised rate. "
                "pooled: over all good test images, folds and seeds; interval: 95 % confidence interval of the pooled "
                "rate if each group of images is one independent trial.",
            )
            columns += [
                Column("promised", f"{RATE}_promised"),
                Column("pooled", f"{RATE}_pooled"),
                Column("interval from", f"{RATE}_low"),
                Column("to", f"{RATE}_high"),
                Column("groups", f"{RATE}_groups", 1, ".0f"),
            ]
        cells = [
            [row["method"], *(_written(row, column) for column in columns), row[f"{metric}_worst_set"] or "–"]
            for row in summary.rows
        ]
        sets = max(row[f"{metric}_sets"] for row in summary.rows)
        heads = ["method", *(column.heading for column in columns), "worst set"]
        yield Part(f"{heading} ({sets} sets)", 3, heads, cells, notes)


def _legend(plan: Plan, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield paragraphs that explain the tables."""
    yield (
        "Metrics in per cent over all test images of a fold, mean over folds, then mean ± standard deviation over "
        "seeds. FAR: share of good test images above the threshold, which was set from held-out normal images."
    )
    compared = [method for method in plan.methods if plan.baseline_of(method) != method.name]
    if compared:
        yield (
            f"p: p-value of a two-sided sign-flip test of the difference ({_comparisons(plan, compared)}), paired over "
            "seeds, folds and subclasses. The smallest p-value of n pairs is 2/2ⁿ; pairs of one subclass share its "
            "images. train s: training time in seconds, with cached features where the method caches them. "
            "ms/image: time to read and score an image and compute its map, without caches. MiB: peak memory of the "
            "process of the run. M parameters: millions of numbers in a saved model."
        )
    if any("category" in row for row in rows):
        compared = [method for method in plan.methods if method.baseline]
        changes = f" Δ: change, mean over seeds ({_comparisons(plan, compared)})." if compared else ""
        yield (
            "(pooled): the test images of all categories together, ranked under one threshold. (mean): mean over the "
            "categories. d normal, d abnormal: mean distance of good and of defective patches to their "
            "reconstruction; ratio: d abnormal / d normal; cell AUROC: AUROC of this distance over patches." + changes
        )


def _comparisons(plan: Plan, methods: Sequence[MethodPlan]) -> str:
    names: dict[str, list[str]] = defaultdict(list)
    for method in methods:
        names[plan.baseline_of(method)].append(method.name)
    return "; ".join(f"{', '.join(compared)} against {baseline}" for baseline, compared in names.items())


def _written(row: dict[str, Any], column: Column) -> str:
    value, std = row[column.name], row.get(f"{column.name}_sd")
    if value is None:
        return "–"
    text = f"{column.scale * value:{column.style}}"
    return text if std is None else f"{text} ± {column.scale * std:{column.style.lstrip('+')}}"


# ── CSV and Parquet ──────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as CSV."""

    def table(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _columns(rows))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, table)


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], provenance: Sequence[str]) -> None:
    """Write the rows as Parquet, with `provenance` in the metadata of the file."""
    import pyarrow
    from pyarrow import parquet

    columns = {name: [row.get(name) for row in rows] for name in _columns(rows)}
    table = pyarrow.table(columns)
    described = table.replace_schema_metadata({"provenance": "\n".join(provenance)})
    write_atomically(path, lambda partial: parquet.write_table(described, partial))
