"""Figures of a results table: bars, bars by subclass, histograms of scores, maps, embeddings, curves of settings."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave import settings
from normweave.atomic import write_atomically
from normweave.benchmark import artifacts
from normweave.benchmark.artifacts import RunArtifacts
from normweave.benchmark.plan import DataPlan, MethodPlan, Plan
from normweave.benchmark.protocols import Divisions, Fold
from normweave.benchmark.table import MEAN, Figure, Result
from normweave.bridges import peers
from normweave.config import Config
from normweave.data import images
from normweave.errors import DataError, ImageError
from normweave.maps.overlay import inferno
from normweave.report.figures import bin_counts, bin_edges
from normweave.types import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

CHANCE = {"image_auroc": 0.5, "pixel_auroc": 0.5, "aupro": 0.15}
"""Values of random scores, at which bars start. AUPRO is integrated up to a false-positive rate of 0.3."""
HEADINGS = {"image_auroc": "I-AUROC", "pixel_auroc": "P-AUROC", "aupro": "AUPRO"}
CURVE_POINTS = 3
"""A curve needs this many methods that differ in a single setting."""
BINS = 32
# colours of Okabe and Ito, distinguishable with any colour vision
BLUE, ORANGE, INK = "#0072b2", "#d55e00", "#16202c"
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a600", "#000000")
MARKERS = "osD^vP*X<>"
STYLE: Any = {"svg.hashsalt": "normweave", "svg.fonttype": "none", "font.size": 9.0, "axes.titlesize": 9.5}

Curve = dict[str, list[tuple[float, Mapping[str, Any]]]]
"""(value of the setting, row of the table) in ascending order, by data set, protocol and side."""


class _Part(NamedTuple):
    """The runs of one data set and protocol, tested on seen or on unseen subclasses (side)."""

    data: str
    protocol: str
    side: str
    results: dict[str, list[Result]]  # by method, in the order of the plan

    @property
    def name(self) -> str:
        return _file_name(f"{self.data} {self.protocol} {self.side}")

    @property
    def heading(self) -> str:
        return f"{self.data}: {self.protocol}, {self.side} subclasses"

    @property
    def seed(self) -> int:
        """The first seed that every method has, or the first of all."""
        seeds = [{run["seed"] for run in runs} for runs in self.results.values()]
        return int(min(set.intersection(*seeds) or set.union(*seeds)))


def draw(
    plan: Plan,
    results: Sequence[Result],
    rows: Sequence[Mapping[str, Any]],
    divisions: Divisions,
    *,
    runs: Path,
    folder: Path,
) -> list[Figure]:
    """Draw all figures of the results into `folder` and return them in the order of the table.

    Figures of earlier results are deleted.

    Args:
        results: results of `run`; failed ones are left out.
        rows: rows of the table.
        divisions: the folds of the runs.
        runs: folder with the artifacts of the runs.
    """
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []

    def save(name: str, drawing: Drawing | None, caption: str, *, suffix: str = ".svg") -> None:
        if drawing is None:
            return
        options: dict[str, Any] = (
            {"format": "svg", "metadata": {"Date": None}} if suffix == ".svg" else {"format": "jpeg", "dpi": 110}
        )
        path = folder / f"{name}{suffix}"
        write_atomically(path, lambda to: drawing.savefig(to, facecolor="white", bbox_inches="tight", **options))
        figures.append(Figure(path, caption))

    with rc_context(STYLE):
        for part in _parts(plan, [result for result in results if "error" not in result]):
            own = [
                row
                for row in rows
                if (row["data"], row["protocol"], row["side"]) == (part.data, part.protocol, part.side)
                and row.get("category") in (None, MEAN)
            ]
            save(
                f"methods-{part.name}",
                _methods(own),
                f"{part.heading}. Mean and standard deviation over seeds; bars start at chance.",
            )
            save(
                f"subclasses-{part.name}",
                _subclasses(part),
                f"{part.heading}. I-AUROC of each subclass, mean and standard deviation over seeds; bars start at "
                "chance.",
            )
            first = _first_fold(part, divisions, runs)
            if first is None:
                continue
            fold, saved = first
            origin = f"Seed {part.seed}, fold {fold.name}."
            save(
                f"scores-{part.name}",
                _histograms(part.side, saved),
                f"{part.heading}. Scores of good (blue, filled) and defective test images (orange, outlined) minus "
                f"the threshold (dashed), in standard deviations of the good ones. {origin}",
            )
            save(
                f"maps-{part.name}",
                _maps(part.side, fold, saved),
                f"{part.heading}. Image, marked defect, and the anomaly map of each method, with one scale for each "
                f"method. {origin} The images were selected by their names.",
                suffix=".jpg",
            )
            if part.side == list(fold.tests)[-1]:
                save(
                    f"routing-{_file_name(part.data)}-{part.protocol}",
                    _embeddings(saved),
                    f"{part.data}: {part.protocol}. Embeddings by which each method distinguishes subclasses (t-SNE): "
                    f"training images (dots), good test images (circles), defective test images (crosses). {origin}",
                )
        for setting, curve in curves(plan, rows):
            save(
                f"curve-{_file_name(setting)}",
                _curve(setting, curve),
                f"Effect of {setting}, all other settings equal. Mean and standard deviation over seeds.",
            )
    for prefix in ("methods", "subclasses", "scores", "maps", "routing", "curve"):
        for old in set(folder.glob(f"{prefix}-*")) - {figure.path for figure in figures}:
            old.unlink()
    return figures


# ── selection ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parts(plan: Plan, results: Sequence[Result]) -> Iterator[_Part]:
    for item in plan.data:
        for protocol in item.protocols:
            own = [r for r in results if (r["data"], r["protocol"]) == (item.name, protocol)]
            for side in sorted({side for result in own for side in result["sides"]}):
                by_method = {
                    method.name: [r for r in own if r["method"] == method.name and side in r["sides"]]
                    for method in plan.methods
                }
                yield _Part(item.name, protocol, side, {name: runs for name, runs in by_method.items() if runs})


def _first_fold(part: _Part, divisions: Divisions, runs: Path) -> tuple[Fold, dict[str, RunArtifacts]] | None:
    """Return the first fold of the first seed with test images of this side, and its artifacts by method."""
    for fold in divisions[part.data, part.protocol, part.seed]:
        if part.side in fold.tests:
            paths = {
                name: runs / run["artifact"]
                for name, results in part.results.items()
                for run in results
                if (run["seed"], run["fold"]) == (part.seed, fold.name) and "artifact" in run
            }
            saved = {name: artifacts.read(path, fold) for name, path in paths.items() if path.exists()}
            return (fold, saved) if saved else None
    return None


def curves(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Curve]]:
    """Yield each numeric setting in which alone at least three methods differ, with its curves."""
    measured = {row["method"] for row in rows if row["side"]}
    flat = {method.name: _flat(plan.data[0], method) for method in plan.methods if method.name in measured}
    keys = {key for values in flat.values() for key, value in values.items() if _is_number(value)}
    for key in sorted(keys):
        groups: dict[str, dict[float, str]] = defaultdict(dict)
        for name, values in flat.items():
            if _is_number(values.get(key)):
                others = repr(sorted((k, repr(v)) for k, v in values.items() if k != key))
                groups[others].setdefault(values[key], name)
        for group in groups.values():
            if len(group) < CURVE_POINTS:
                continue
            curve: Curve = defaultdict(list)
            for value, name in sorted(group.items()):
                for row in rows:
                    if row["method"] == name and row["side"] and row.get("category") in (None, MEAN):
                        curve[f"{row['data']}: {row['protocol']}, {row['side']}"].append((value, row))
            yield key, dict(curve)


def _flat(item: DataPlan, method: MethodPlan) -> dict[str, Any]:
    """Return every setting of a method by its dotted name."""
    chosen = [*item.set, *method.set]
    if peers.is_peer(method.model):
        peer = peers.read(method.model, chosen, seed=0)
        return {"model": method.model, **peer.values, **_dotted(settings.as_dict(peer.config))}
    config = settings.override(settings.with_model(Config(), method.model), chosen)
    return {"model": method.model, **_dotted(settings.as_dict(config))}


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _file_name(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


# ── drawings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _panels(count: int, width: float, height: float, *, columns: int, **options: Any) -> tuple[Drawing, list[Axes]]:
    """Return a drawing and `count` axes of width x height inches, at most `columns` in a row."""
    columns = min(count, columns)
    drawing, grid = _grid(math.ceil(count / columns), columns, width, height, **options)
    axes = [panel for line in grid for panel in line]
    for panel in axes[count:]:
        panel.set_axis_off()
    return drawing, axes[:count]


def _grid(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Drawing, list[list[Axes]]]:
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(width * columns, height * rows), layout="constrained")
    return drawing, drawing.subplots(rows, columns, squeeze=False, **options).tolist()


def _bars(axes: Axes, values: Sequence[tuple[float, float] | None], *, start: float) -> None:
    """Draw a bar from `start` to each mean, in per cent, with its standard deviation; None leaves a gap."""
    start *= 100
    ends = [100 * value[0] for value in values if value is not None]
    for row, value in enumerate(values):
        if value is None:
            axes.text(start, row, " –", va="center", color=INK)
            continue
        end, std = 100 * value[0], 100 * value[1]
        axes.barh(row, end - start, left=start, height=0.72, color=BLUE if end >= start else ORANGE)
        if std:
            axes.errorbar(end, row, xerr=std, color=INK, capsize=2, linewidth=1)
        axes.text(max(end + std, start) + 1.6, row, f"{end:.1f}", va="center", color=INK)
    axes.set_xlim(min([start, *ends]), 108)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _methods(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    metrics = [name for name in CHANCE if any(row[name] is not None for row in rows)]
    if len(rows) < 2 or not metrics:
        return None
    drawing, axes = _panels(len(metrics), 3.0, 0.6 + 0.24 * len(rows), columns=len(CHANCE), sharey=True)
    for panel, name in zip(axes, metrics, strict=True):
        values = [None if row[name] is None else (row[name], row[f"{name}_sd"] or 0.0) for row in rows]
        _bars(panel, values, start=CHANCE[name])
        panel.set_title(HEADINGS[name])
    axes[0].set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes[0].invert_yaxis()
    return drawing


def _subclasses(part: _Part) -> Drawing | None:
    names = sorted(
        {
            name
            for runs in part.results.values()
            for run in runs
            for name, table in run["sides"][part.side].get("by_subclass", {}).items()
            if table.get("image_auroc") is not None
        }
    )
    if len(names) < 2:
        return None
    drawing, axes = _panels(len(names), 2.0, 0.6 + 0.2 * len(part.results), columns=5, sharey=True)
    several = len({name.split("/")[0] for name in names}) > 1
    for panel, name in zip(axes, names, strict=True):
        _bars(panel, [_of_subclass(runs, part.side, name) for runs in part.results.values()], start=0.5)
        panel.set_title(name if several else name.split("/")[-1])
    axes[0].set_yticks(range(len(part.results)), list(part.results))
    axes[0].invert_yaxis()
    return drawing


def _of_subclass(runs: Sequence[Result], side: str, name: str) -> tuple[float, float] | None:
    """Return mean and standard deviation over the seeds of the mean over the folds."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        value = run["sides"][side].get("by_subclass", {}).get(name, {}).get("image_auroc")
        if value is not None:
            by_seed[run["seed"]].append(value)
    means = [mean(values) for values in by_seed.values()]
    return (mean(means), stdev(means) if len(means) > 1 else 0.0) if means else None


def _histograms(side: str, saved: Mapping[str, RunArtifacts]) -> Drawing | None:
    drawing, axes = _panels(len(saved), 2.5, 1.5, columns=4)
    for panel, (name, artifact) in zip(axes, saved.items(), strict=True):
        anomalous, scores, thresholds = artifact.scores[side].T
        good, bad = ((scores - thresholds)[anomalous == label] for label in (0, 1))
        unit = (float(good.std()) if len(good) > 1 else 0.0) or 1.0
        edges = bin_edges(np.concatenate([good, bad]) / unit, 0.0, bins=BINS)
        shares = [bin_counts(values / unit, edges) / max(1, len(values)) for values in (good, bad)]
        panel.stairs(shares[0], edges, fill=True, color=BLUE, alpha=0.55)
        panel.stairs(shares[1], edges, color=ORANGE, linewidth=1.4)
        panel.axvline(0, color=INK, linewidth=1, linestyle="--")
        panel.set_title(name, fontsize=8)
        panel.set_yticks([])
        panel.spines[["top", "right", "left"]].set_visible(False)
    return drawing


def _embeddings(saved: Mapping[str, RunArtifacts]) -> Drawing | None:
    """Draw one panel for each embedding; methods with equal embeddings share it."""
    from sklearn.manifold import TSNE

    groups: list[tuple[list[str], RunArtifacts, NDArray[np.float32]]] = []
    for method, artifact in saved.items():
        points = artifact.embeddings
        if points is None or len(points) < 4 or len(set(artifact.subclass_names)) < 2:
            continue
        for methods, _, others in groups:
            if np.array_equal(others, points):
                methods.append(method)
                break
        else:
            groups.append(([method], artifact, points))
    if not groups:
        return None
    drawing, axes = _panels(len(groups), 3.6, 3.4, columns=3)
    names = sorted({name for _, artifact, _ in groups for name in artifact.subclass_names})
    for panel, (methods, artifact, points) in zip(axes, groups, strict=True):
        tsne = TSNE(perplexity=min(30, (len(points) - 1) / 3), init="pca", random_state=0)
        flat = tsne.fit_transform(points)
        own = np.array(artifact.subclass_names)
        for number, name in enumerate(names):
            colour = SERIES[number % len(SERIES)]
            markers: list[dict[str, Any]] = [  # by role
                {"s": 5, "color": colour},
                {"s": 18, "facecolors": "none", "edgecolors": colour, "linewidths": 0.9},
                {"s": 14, "color": colour, "marker": "x", "linewidths": 0.7},
            ]
            for role, marker in enumerate(markers):
                panel.scatter(*flat[(own == name) & (artifact.roles == role)].T, **marker)
        for name in names:  # at the median, so that no colour key is needed
            if (own == name).any():
                x, y = np.median(flat[own == name], axis=0)
                box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
                panel.text(x, y, name.split("/")[-1], fontsize=8, ha="center", color=INK, bbox=box)
        more = f" and {len(methods) - 1} more" if len(methods) > 1 else ""
        panel.set_title(f"{methods[0]}{more}", fontsize=8)
        panel.set_xticks([])
        panel.set_yticks([])
    return drawing


def _maps(side: str, fold: Fold, saved: Mapping[str, RunArtifacts]) -> Drawing | None:
    shown = artifacts.shown(fold.tests[side])
    methods = {
        name: artifact.maps[side]
        for name, artifact in saved.items()
        if any(one is not None for one in artifact.maps[side])
    }
    if not shown or not methods:
        return None
    drawing, grid = _grid(len(shown), 2 + len(methods), 1.15, 1.15)
    scales = {name: _scale([one for one in maps if one is not None]) for name, maps in methods.items()}
    for row, (line, sample) in enumerate(zip(grid, shown, strict=True)):
        image, mask = image_and_mask(sample)
        line[0].imshow(image)
        line[1].imshow(mask, cmap="gray", vmin=0, vmax=1)
        label = f"{sample.subclass or sample.category}\n{sample.defect or 'good'}"
        line[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
        for panel, (name, maps) in zip(line[2:], methods.items(), strict=True):
            if (anomaly_map := maps[row]) is not None:
                low, high = scales[name]
                panel.imshow(inferno(np.clip((anomaly_map - low) / (high - low), 0, 1)).astype(np.uint8))
        for panel in line:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
    for panel, name in zip(grid[0], ["image", "marked defect", *methods], strict=True):
        panel.set_title("\n".join(textwrap.wrap(name, 17)), fontsize=7)
    return drawing


def image_and_mask(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return the image (h, w, 3) and its mask (h, w) at the size of the saved maps; grey where unreadable."""
    try:
        image = images.decode(sample.image_path)
    except ImageError:
        image = np.full((artifacts.LONGEST, artifacts.LONGEST, 3), 128, dtype=np.uint8)
    height, width = image.shape[:2]
    mask = np.zeros((height, width), dtype=np.float32)
    if sample.mask_path is not None:
        try:
            mask = images.read_mask(sample.mask_path, height=height, width=width).astype(np.float32)
        except DataError:
            mask[:] = 0.5
    return artifacts.small(image), artifacts.small(mask)


def _scale(maps: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    low, high = np.quantile(np.concatenate([one.ravel() for one in maps]), [0.01, 0.998])
    return float(low), float(max(high, low + 1e-12))


def _curve(setting: str, curve: Curve) -> Drawing | None:
    rows = [row for points in curve.values() for _, row in points]
    metrics = [name for name in CHANCE if any(row[name] is not None for row in rows)]
    if not metrics:
        return None
    drawing, axes = _panels(len(metrics), 3.2, 2.8, columns=len(CHANCE))
    for panel, name in zip(axes, metrics, strict=True):
        for number, (label, points) in enumerate(curve.items()):
            known = [(value, row) for value, row in points if row[name] is not None]
            panel.errorbar(
                [value for value, _ in known],
                [100 * row[name] for _, row in known],
                yerr=[100 * (row[f"{name}_sd"] or 0.0) for _, row in known],
                color=SERIES[number % len(SERIES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                capsize=2,
                label=label,
            )
        panel.set_title(HEADINGS[name])
        panel.set_xlabel(setting)
        panel.set_xticks(sorted({value for points in curve.values() for value, _ in points}))
        panel.spines[["top", "right"]].set_visible(False)
    handles = axes[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside lower center", fontsize=8, frameon=False)
    return drawing
