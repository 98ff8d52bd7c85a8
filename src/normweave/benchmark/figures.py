"""The figures of a table: bars, bars by subclass, a setting's curve, score histograms, routing, images with maps."""

from __future__ import annotations

import math
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
from normweave.benchmark.protocols import Fold
from normweave.benchmark.table import MEAN, Figure, Result
from normweave.bridges import peers
from normweave.config import Config
from normweave.data import images
from normweave.errors import DataError, ImageError
from normweave.types import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

CHANCE = {"image_auroc": 0.5, "pixel_auroc": 0.5, "aupro": 0.15}
"""What guessing reaches: bars begin here. AUPRO is taken up to a false-positive rate of 0.3."""
HEADINGS = {"image_auroc": "I-AUROC", "pixel_auroc": "P-AUROC", "aupro": "AUPRO"}
LEAST_POINTS = 3
"""Methods that differ in one setting only, from which on they make a curve."""
BINS = 32
# Okabe and Ito's colours, which can be told apart with any colour vision.
BLUE, ORANGE, INK = "#0072b2", "#d55e00", "#16202c"
SERIES = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a600", "#000000")
MARKERS = "osD^vP*X<>"
STYLE: Any = {"svg.hashsalt": "normweave", "svg.fonttype": "none", "font.size": 9.0, "axes.titlesize": 9.5}


class _Part(NamedTuple):
    """The runs of one data set, protocol and side."""

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


def draw(
    plan: Plan,
    results: Sequence[Result],
    rows: Sequence[Mapping[str, Any]],
    data: Mapping[str, Sequence[Sample]],
    *,
    kept: Path,
    folder: Path,
) -> list[Figure]:
    """Draw every figure that these results allow, and return them in the order of the table.

    Figures of an earlier time that these results do not give are deleted.

    Args:
        results: of `run`; those that failed are left out.
        rows: of the table.
        data: the samples of each data set of the plan.
        kept: where the runs have kept their artifacts.
        folder: where the figures go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    good = [result for result in results if "error" not in result]
    figures: list[Figure] = []

    def save(name: str, drawing: Drawing | None, caption: str, *, suffix: str = ".svg") -> None:
        if drawing is None:
            return
        path = folder / f"{name}{suffix}"
        about: dict[str, Any] = {"metadata": {"Date": None}} if suffix == ".svg" else {"dpi": 110}
        kind = "svg" if suffix == ".svg" else "jpeg"
        write_atomically(
            path, lambda to: drawing.savefig(to, format=kind, facecolor="white", bbox_inches="tight", **about)
        )
        figures.append(Figure(path, caption))

    from matplotlib import rc_context

    with rc_context(STYLE):
        for part in _parts(plan, good):
            own = [
                row
                for row in rows
                if (row["data"], row["protocol"], row["side"]) == (part.data, part.protocol, part.side)
                and row.get("category") in (None, MEAN)
            ]
            save(
                f"methods-{part.name}",
                _methods(own),
                f"{part.heading}. Mean and deviation over seeds; bars begin at what guessing reaches.",
            )
            save(
                f"subclasses-{part.name}",
                _subclasses(part),
                f"{part.heading}. I-AUROC by subclass, mean and deviation over seeds; bars begin at guessing.",
            )
            first = _first_fold(plan, part, data, kept)
            if first is None:
                continue
            fold, seen = first
            seed = f"Seed {_seed(part)}, fold {fold.name}."
            save(
                f"scores-{part.name}",
                _histograms(part.side, seen),
                f"{part.heading}. Scores of good (blue, filled) and defective test images (orange, outlined), each "
                f"above or below its operating point (the line at 0), in deviations of the good ones; the "
                f"last bin holds all beyond. {seed}",
            )
            save(
                f"maps-{part.name}",
                _maps(part.side, fold, seen),
                f"{part.heading}. Image, marked defect, and the map of each method, one scale a method. {seed} The "
                "images were chosen by their names.",
                suffix=".jpg",
            )
            if part.side == list(fold.tests)[-1]:
                save(
                    f"routing-{_file_name(part.data)}-{part.protocol}",
                    _routing(seen),
                    f"{part.data}: {part.protocol}. Where images lie in the space in which each method tells kinds "
                    f"apart (t-SNE): dots trained, circles are good test images, crosses defective ones. {seed}",
                )
        for setting, lines in _curves(plan, rows):
            save(
                f"curve-{_file_name(setting)}",
                _curve(setting, lines),
                f"What {setting} changes, all else equal. Mean and deviation over seeds.",
            )
    for kind in ("methods", "subclasses", "scores", "maps", "routing", "curve"):
        for old in set(folder.glob(f"{kind}-*")) - {figure.path for figure in figures}:
            old.unlink()
    return figures


# ── what belongs together ────────────────────────────────────────────────────────────────────────────────────────────


def _parts(plan: Plan, results: Sequence[Result]) -> Iterator[_Part]:
    for item in plan.data:
        for protocol in item.protocols:
            own = [r for r in results if (r["data"], r["protocol"]) == (item.name, protocol)]
            for side in sorted({side for result in own for side in result["sides"]}):
                by_method = {
                    method.name: [r for r in own if r["method"] == method.name and side in r["sides"]]
                    for method in plan.methods
                }
                found = {name: runs for name, runs in by_method.items() if runs}
                yield _Part(item.name, protocol, side, found)


def _seed(part: _Part) -> int:
    """The first seed that every method has; else the first of all."""
    seeds = [{run["seed"] for run in runs} for runs in part.results.values()]
    return int(min(set.intersection(*seeds) or set.union(*seeds)))


def _first_fold(
    plan: Plan, part: _Part, data: Mapping[str, Sequence[Sample]], kept: Path
) -> tuple[Fold, dict[str, RunArtifacts]] | None:
    """The first fold of the first seed that has this side, and what the methods have kept of it."""
    item: DataPlan = next(item for item in plan.data if item.name == part.data)
    seed = _seed(part)
    for fold in item.folds(data[part.data], part.protocol, seed=seed):
        if part.side in fold.tests:
            found = {
                name: kept / run["artifact"]
                for name, runs in part.results.items()
                for run in runs
                if (run["seed"], run["fold"]) == (seed, fold.name)
                and "artifact" in run  # older ones kept none
            }
            seen = {name: artifacts.read(path, fold) for name, path in found.items() if path.exists()}
            return (fold, seen) if seen else None
    return None


def _curves(
    plan: Plan, rows: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, dict[str, list[tuple[float, Mapping[str, Any]]]]]]:
    """Settings in which alone at least three methods differ: by data and side, (value, row) in rising order."""
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
            if len(group) < LEAST_POINTS:
                continue
            lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = defaultdict(list)
            for value, name in sorted(group.items()):
                for row in rows:
                    if row["method"] == name and row["side"] and row.get("category") in (None, MEAN):
                        lines[f"{row['data']}: {row['protocol']}, {row['side']}"].append((value, row))
            yield key, dict(lines)


def _flat(item: DataPlan, method: MethodPlan) -> dict[str, Any]:
    """Every setting of a method, by its dotted name."""
    chosen = [*item.set, *method.set]
    if peers.is_peer(method.model):
        peer = peers.read(method.model, chosen, seed=0)
        return {"model": method.model, **peer.values, **_dotted(settings.as_dict(peer.config))}
    config = settings.override(settings.with_model(Config(), method.model), chosen)
    return {"model": method.model, **_dotted(settings.as_dict(config))}


def _dotted(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _dotted(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ── drawings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _new(
    rows: int, columns: int, width: float, height: float, **shared: Any
) -> tuple[Drawing, list[list[Axes]]]:
    """A drawing of rows x columns axes, each of so many inches."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(width * columns, height * rows), layout="constrained")
    return drawing, drawing.subplots(rows, columns, squeeze=False, **shared).tolist()


def _bars(axes: Axes, values: Sequence[tuple[float, float] | None], *, start: float) -> None:
    """A bar from `start` to each value, in per cent, with its deviation; None leaves a gap."""
    ends = [100 * one[0] for one in values if one is not None]
    for place, one in enumerate(values):
        if one is None:
            axes.text(100 * start, place, " –", va="center", color=INK)
            continue
        value, deviation = 100 * one[0], 100 * one[1]
        axes.barh(
            place,
            value - 100 * start,
            left=100 * start,
            height=0.72,
            color=BLUE if value >= 100 * start else ORANGE,
        )
        if deviation:
            axes.errorbar(value, place, xerr=deviation, color=INK, capsize=2, linewidth=1)
        axes.text(max(value + deviation, 100 * start) + 1.6, place, f"{value:.1f}", va="center", color=INK)
    axes.set_xlim(min([100 * start, *ends]), 108)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _methods(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    if len(rows) < 2:
        return None
    measures = [name for name in CHANCE if any(row[name] is not None for row in rows)]
    drawing, ((*axes,),) = _new(1, len(measures), 3.0, 0.6 + 0.24 * len(rows), sharey=True)
    for one, name in zip(axes, measures, strict=True):
        _bars(
            one,
            [None if row[name] is None else (row[name], row[f"{name}_sd"] or 0.0) for row in rows],
            start=CHANCE[name],
        )
        one.set_title(HEADINGS[name])
    axes[0].set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes[0].invert_yaxis()
    return drawing


def _subclasses(part: _Part) -> Drawing | None:
    kinds = sorted(
        {
            kind
            for runs in part.results.values()
            for run in runs
            for kind, table in run["sides"][part.side].get("by_subclass", {}).items()
            if table.get("image_auroc") is not None
        }
    )
    if len(kinds) < 2:
        return None
    columns = min(len(kinds), 5)
    rows = math.ceil(len(kinds) / columns)
    drawing, grid = _new(rows, columns, 2.0, 0.6 + 0.2 * len(part.results), sharey=True)
    axes = [one for line in grid for one in line]
    for one, kind in zip(axes, kinds, strict=False):
        _bars(one, [_of_subclass(runs, part.side, kind) for runs in part.results.values()], start=0.5)
        one.set_title(kind if len({name.split("/")[0] for name in kinds}) > 1 else kind.split("/")[-1])
    for one in axes[len(kinds) :]:
        one.set_axis_off()
    axes[0].set_yticks(range(len(part.results)), list(part.results))
    axes[0].invert_yaxis()
    return drawing


def _of_subclass(runs: Sequence[Result], side: str, kind: str) -> tuple[float, float] | None:
    """Mean and deviation over the seeds of each seed's mean over folds."""
    found: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        value = run["sides"][side].get("by_subclass", {}).get(kind, {}).get("image_auroc")
        if value is not None:
            found[run["seed"]].append(value)
    seeds = [mean(values) for values in found.values()]
    return (mean(seeds), stdev(seeds) if len(seeds) > 1 else 0.0) if seeds else None


def _histograms(side: str, seen: Mapping[str, RunArtifacts]) -> Drawing | None:
    columns = min(len(seen), 4)
    rows = math.ceil(len(seen) / columns)
    drawing, grid = _new(rows, columns, 2.5, 1.5)
    axes = [one for line in grid for one in line]
    for one, (name, artifact) in zip(axes, seen.items(), strict=False):
        anomalous, scores, thresholds = artifact.scores[side].T
        above = scores - thresholds
        good, bad = above[anomalous == 0], above[anomalous == 1]
        unit = (float(good.std()) if len(good) > 1 else 0.0) or 1.0
        low, high = np.quantile(above / unit, [0.0, 0.97]) if len(above) else (-1.0, 1.0)
        bins = np.linspace(min(low, -0.5), max(high, 0.5), BINS + 1)

        def shares(values: NDArray[np.float64], bins: NDArray[np.float64] = bins, unit: float = unit) -> Any:
            return np.histogram(np.clip(values / unit, bins[0], bins[-1]), bins)[0] / max(1, len(values))

        one.stairs(shares(good), bins, fill=True, color=BLUE, alpha=0.55)
        one.stairs(shares(bad), bins, color=ORANGE, linewidth=1.4)
        one.axvline(0, color=INK, linewidth=1, linestyle="--")
        one.set_title(name, fontsize=8)
        one.set_yticks([])
        one.spines[["top", "right", "left"]].set_visible(False)
    for one in axes[len(seen) :]:
        one.set_axis_off()
    return drawing


def _routing(seen: Mapping[str, RunArtifacts]) -> Drawing | None:
    """One panel for each space: methods that tell kinds apart in the same one share it."""
    from sklearn.manifold import TSNE

    spaces: list[tuple[list[str], RunArtifacts]] = []
    for name, artifact in seen.items():
        if (
            artifact.embeddings is None
            or len(artifact.embeddings) < 4
            or len(set(artifact.subclass_names)) < 2
        ):
            continue
        for names, other in spaces:
            if other.embeddings is not None and np.array_equal(other.embeddings, artifact.embeddings):
                names.append(name)
                break
        else:
            spaces.append(([name], artifact))
    if not spaces:
        return None
    columns = min(len(spaces), 3)
    drawing, grid = _new(math.ceil(len(spaces) / columns), columns, 3.6, 3.4)
    axes = [one for line in grid for one in line]
    kinds = sorted({kind for _, artifact in spaces for kind in artifact.subclass_names})
    for one, (names, artifact) in zip(axes, spaces, strict=False):
        assert artifact.embeddings is not None
        tsne = TSNE(perplexity=min(30, (len(artifact.embeddings) - 1) / 3), init="pca", random_state=0)
        flat = tsne.fit_transform(artifact.embeddings)
        own = np.array(artifact.subclass_names)
        for place, kind in enumerate(kinds):
            colour = SERIES[place % len(SERIES)]
            looks: list[dict[str, Any]] = [  # by role
                {"s": 5, "color": colour},
                {"s": 18, "facecolors": "none", "edgecolors": colour, "linewidths": 0.9},
                {"s": 14, "color": colour, "marker": "x", "linewidths": 0.7},
            ]
            for role, look in enumerate(looks):
                x, y = flat[(own == kind) & (artifact.roles == role)].T
                one.scatter(x, y, **look)
        for kind in kinds:  # names where most of a kind lie: nobody has to tell nine colours apart
            if (own == kind).any():
                x, y = np.median(flat[own == kind], axis=0)
                ground = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}
                one.text(x, y, kind.split("/")[-1], fontsize=8, ha="center", color=INK, bbox=ground)
        one.set_title(_together(names), fontsize=8)
        one.set_xticks([])
        one.set_yticks([])
    for one in axes[len(spaces) :]:
        one.set_axis_off()
    return drawing


def _together(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _maps(side: str, fold: Fold, seen: Mapping[str, RunArtifacts]) -> Drawing | None:
    shown = artifacts.shown(fold.tests[side])
    methods = {
        name: artifact.maps[side]
        for name, artifact in seen.items()
        if any(m is not None for m in artifact.maps[side])
    }
    if not shown or not methods:
        return None
    drawing, grid = _new(len(shown), 2 + len(methods), 1.15, 1.15)
    scales = {name: _scale([m for m in maps if m is not None]) for name, maps in methods.items()}
    for row, (line, sample) in enumerate(zip(grid, shown, strict=True)):
        picture, truth = _picture(sample)
        line[0].imshow(picture)
        line[1].imshow(truth, cmap="gray", vmin=0, vmax=1)
        told = f"{sample.subclass or sample.category}\n{sample.defect or 'good'}"
        line[0].set_ylabel(told, fontsize=7, rotation=0, ha="right", va="center")
        for one, (name, maps) in zip(line[2:], methods.items(), strict=True):
            if (found := maps[row]) is not None:
                low, high = scales[name]
                one.imshow(found, cmap="inferno", vmin=low, vmax=high)
        for one in line:
            one.set_xticks([])
            one.set_yticks([])
            one.spines[:].set_visible(False)
    for one, name in zip(grid[0], ["image", "marked", *methods], strict=True):
        one.set_title(_wrapped(name), fontsize=7)
    return drawing


def _picture(sample: Sample) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Image (h, w, 3) and mask (h, w), as small as the maps; grey where one cannot be read."""
    try:
        whole = images.decode(sample.image_path)
    except ImageError:  # a row of the predictions says why
        whole = np.full((artifacts.LONGEST, artifacts.LONGEST, 3), 128, dtype=np.uint8)
    height, width = whole.shape[:2]
    mask = np.zeros((height, width), dtype=np.float32)
    if sample.mask_path is not None:
        try:
            mask = images.read_mask(sample.mask_path, height=height, width=width).astype(np.float32)
        except DataError:  # listed by `measure`
            mask[:] = 0.5
    return artifacts.small(whole), artifacts.small(mask)


def _scale(maps: Sequence[NDArray[np.float32]]) -> tuple[float, float]:
    values = np.concatenate([one.ravel() for one in maps])
    low, high = np.quantile(values, [0.01, 0.998])
    return float(low), float(max(high, low + 1e-12))


def _wrapped(text: str, width: int = 17) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def _curve(setting: str, lines: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]) -> Drawing | None:
    measures = [
        n for n in CHANCE if any(row[n] is not None for points in lines.values() for _, row in points)
    ]
    if not measures:
        return None
    drawing, ((*axes,),) = _new(1, len(measures), 3.2, 2.8)
    for one, name in zip(axes, measures, strict=True):
        for place, (label, points) in enumerate(lines.items()):
            known = [(value, row) for value, row in points if row[name] is not None]
            one.errorbar(
                [value for value, _ in known],
                [100 * row[name] for _, row in known],
                yerr=[100 * (row[f"{name}_sd"] or 0.0) for _, row in known],
                color=SERIES[place % len(SERIES)],
                marker=MARKERS[place % len(MARKERS)],
                markersize=4,
                capsize=2,
                label=label,
            )
        one.set_title(HEADINGS[name])
        one.set_xlabel(setting)
        one.set_xticks(sorted({value for points in lines.values() for value, _ in points}))
        one.spines[["top", "right"]].set_visible(False)
    drawing.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False
    )
    return drawing


def _file_name(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
