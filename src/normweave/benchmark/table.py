"""The results of a plan's runs as a table: Markdown and HTML to read, CSV and Parquet to reckon with."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from normweave import __version__
from normweave.atomic import write_atomically
from normweave.benchmark.plan import Plan
from normweave.report.html import render
from normweave.report.metrics import sign_flip_p_value

MEASURES = (
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
"""Those whose change against a method's baseline is shown."""
COMPARED = ("image_auroc", "pixel_auroc")
"""Those whose difference to the baseline is tested."""
COSTS = ("train_s", "test_ms", "inference_ms", "peak_mib", "parameters")
"""Of a run; results of older versions lack some."""
POOLED, MEAN = "(pooled)", "(mean)"
"""Beside the names of the categories: all their test images together, and the mean over them."""


class Column(NamedTuple):
    """One number of each row, as it is written."""

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
    Column("M numbers", "parameters", 1e-6, ".2f"),
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
"""What a run left: `sides` with their metrics, costs, or the reason why it failed (`error`)."""


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_rows(plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Means over the folds of a seed, then mean and deviation over the seeds."""
    rows = []
    for item in plan.data:
        for protocol in item.protocols:
            by_method = {
                method.name: [
                    result
                    for result in results
                    if (result["data"], result["protocol"], result["method"])
                    == (item.name, protocol, method.name)
                    and "error" not in result
                ]
                for method in plan.methods
            }
            for method in plan.methods:
                own, base = by_method[method.name], by_method.get(method.baseline, [])
                other = plan.baseline_of(method)
                rival = [] if other == method.name else by_method[other]
                for side in sorted({side for result in own for side in result["sides"]}):
                    start = {"data": item.name, "protocol": protocol, "side": side, "method": method.name}
                    categories = _categories(own, side)
                    if len(categories) < 2:
                        rows.append(start | _row(own, side) | _significance(own, rival, side))
                        continue
                    for category in (POOLED, MEAN, *categories):
                        numbers = _row(own, side, category) | _over_generalisation(own, base, side, category)
                        tested = _significance(own, rival, side, category)
                        rows.append(start | {"category": category} | numbers | tested)
    return rows


def failures(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each reason for which runs of a method failed."""
    counted: dict[tuple[str, ...], int] = defaultdict(int)
    for result in results:
        if "error" in result:
            counted[tuple(result[key] for key in ("data", "protocol", "method", "error"))] += 1
    return [
        {
            "data": data,
            "protocol": protocol,
            "side": None,
            "method": method,
            "error": error,
            "failed_runs": count,
        }
        for (data, protocol, method, error), count in counted.items()
    ]


def _categories(results: Sequence[Result], side: str) -> list[str]:
    return sorted({name for result in results for name in result["sides"][side]["by_category"]})


def _row(results: Sequence[Result], side: str, category: str = POOLED) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len({result["seed"] for result in results})}
    for name in MEASURES:
        row |= _summary(name, _by_seed(results, side, category, name))
    for name in COSTS:
        known = [result[name] for result in results if result.get(name) is not None]
        row[name] = mean(known) if known else None
    return row


def _over_generalisation(
    results: Sequence[Result], baseline: Sequence[Result], side: str, category: str
) -> dict[str, Any]:
    """Its numbers, and by how much two of them differ from those of the baseline's runs with the same seeds."""
    row: dict[str, Any] = {}
    for name in OVER_GENERALISATION:
        row |= _summary(name, _by_seed(results, side, category, name))
    for name in CHANGES:
        own, base = (_by_seed(of, side, category, name) for of in (results, baseline))
        row |= _summary(f"{name}_change", {seed: own[seed] - base[seed] for seed in own if seed in base})
    return row


def _significance(
    own: Sequence[Result], rival: Sequence[Result], side: str, category: str = POOLED
) -> dict[str, Any]:
    """How each measure differs from the rival's, paired over seeds, folds and subclasses, and how likely by chance."""
    row: dict[str, Any] = {}
    for name in COMPARED:
        here, there = (_by_subclass(of, side, category, name) for of in (own, rival))
        differences = [here[pair] - there[pair] for pair in sorted(here.keys() & there.keys())]
        row[f"{name}_difference"] = mean(differences) if differences else None
        row[f"{name}_p"] = sign_flip_p_value(differences)
        row[f"{name}_pairs"] = len(differences)
    return row


def _by_subclass(
    results: Sequence[Result], side: str, category: str, name: str
) -> dict[tuple[int, str, str], float]:
    """By seed, fold and subclass, where the number is defined."""
    return {
        (result["seed"], result["fold"], kind): table[name]
        for result in results
        for kind, table in result["sides"].get(side, {}).get("by_subclass", {}).items()
        if table.get(name) is not None
        and (category in (POOLED, MEAN) or kind == category or kind.startswith(f"{category}/"))
    }


def _by_seed(results: Sequence[Result], side: str, category: str, name: str) -> dict[int, float]:
    """Mean over the folds in which the number is defined, for each seed that has one."""
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


# ── to read ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Part(NamedTuple):
    """A heading of level 2 or 3, with a table or without."""

    heading: str
    level: int
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


class Figure(NamedTuple):
    """A picture on disk, with what it shows."""

    path: Path
    caption: str

    @property
    def of_images(self) -> bool:
        """It holds pictures of the data set, which may not be everybody's to pass on."""
        return self.path.suffix == ".jpg"


def markdown(
    plan: Plan,
    rows: Sequence[dict[str, Any]],
    results: Sequence[Result],
    provenance: Sequence[str],
    figures: Sequence[Figure] = (),
) -> str:
    """The table as Markdown, with links to the figures that hold no image of the data."""
    text = [f"# {plan.title}", "", *provenance, ""]
    for paragraph in _legend(plan, rows):
        text += [paragraph, ""]
    for part in _parts(plan, rows, results):
        text += [f"{'#' * part.level} {part.heading}", ""]
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
    # A bar or a line break would end the cell.
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
            "Peers, and what stands in for what they were published with",
            2,
            ["method", "stands in"],
            list(differs.items()),
        )
    if failed := [result for result in results if "error" in result]:
        keys = ("method", "data", "fold", "seed")
        lines = [[*(str(result[key]) for key in keys), result["error"]] for result in failed]
        yield Part("Failed runs", 2, [*keys, "reason"], lines)


def _legend(plan: Plan, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What the tables show."""
    yield (
        "Points in percent over all test images of a fold together, mean over folds, then mean ± deviation over "
        "seeds. FAR: share of good test images above the operating point, which was drawn from held-out normals."
    )
    rivals: dict[str, list[str]] = defaultdict(list)
    for method in plan.methods:
        if (other := plan.baseline_of(method)) != method.name:
            rivals[other].append(method.name)
    if rivals:
        told = "; ".join(
            f"against {other}" + (f" of {', '.join(names)}" if len(rivals) > 1 else "")
            for other, names in rivals.items()
        )
        yield (
            "p: how likely a difference as large would be by chance, two-sided sign-flip test paired over seeds, folds "
            f"and subclasses, {told}; n pairs cannot give less than 2/2ⁿ, and pairs of one subclass share its images. "
            "train s: with features cached where the method's are. ms/image: read, scored and mapped, nothing cached. "
            "MiB: the most that the run's process held. M numbers: millions of numbers that a saved model holds."
        )
    if any("category" in row for row in rows):
        yield _categories_legend(plan)


def _categories_legend(plan: Plan) -> str:
    compared: dict[str, list[str]] = defaultdict(list)
    for method in plan.methods:
        if method.baseline:
            compared[method.baseline].append(method.name)
    changes = "; ".join(f"of {', '.join(names)} against {baseline}" for baseline, names in compared.items())
    return (
        "(pooled): the test images of all categories together, ranked under one threshold. (mean): over the "
        "categories. d normal, d abnormal: mean distance to the reconstruction on good and on damaged patches; ratio: "
        "the second over the first; cell AUROC: how well the distance tells such patches apart."
        + (f" Δ: change, seed by seed, {changes}." if changes else "")
    )


def _written(row: dict[str, Any], column: Column) -> str:
    value, deviation = row[column.name], row.get(f"{column.name}_sd")
    if value is None:
        return "–"
    text = f"{column.scale * value:{column.style}}"
    return text if deviation is None else f"{text} ± {column.scale * deviation:{column.style.lstrip('+')}}"


# ── to reckon with ───────────────────────────────────────────────────────────────────────────────────────────────────


def _columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line a row, one column a number."""

    def table(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _columns(rows))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, table)


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], provenance: Sequence[str]) -> None:
    """The same with types; where it comes from stands in the file's metadata under `provenance`."""
    import pyarrow
    from pyarrow import parquet

    columns = {name: [row.get(name) for row in rows] for name in _columns(rows)}
    table = pyarrow.table(columns)
    described = table.replace_schema_metadata({"provenance": "\n".join(provenance)})
    write_atomically(path, lambda partial: parquet.write_table(described, partial))
