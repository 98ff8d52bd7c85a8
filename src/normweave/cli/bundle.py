"""`normweave bundle`: show a bundle with its history, compare two, and verify one. Needs no torch."""

from pathlib import Path
from typing import Annotated, Any

import typer

from normweave.cli import options
from normweave.cli.terminal import ALL_NORMAL, Terminal

Other = Annotated[Path, typer.Argument(help="Another bundle, usually made of the first.", show_default=False)]


def show(terminal: Terminal, bundle: options.Bundle) -> int:
    """Print what a bundle was trained on, by whom, its operating points, and each step that changed it."""
    from normweave.contents import describe

    found = describe(bundle)
    if terminal.json:
        terminal.record(found)
        return ALL_NORMAL
    from rich.table import Table

    from normweave.cli.train import point_row

    terminal.show(f"{found['bundle']}: {found['model']}, {found['precision']}, {found['bundle_hash'][:12]}")
    table = Table("subclass", "held-out images", "groups", "threshold", box=None)
    for point in found["operating_points"]:
        table.add_row(*point_row(point))
    terminal.show(table)
    for one in found["plugins"]:
        terminal.show(f"needs the plug-in {one['name']} ({one['group']}) of {one['package']} {one['version']}")
    for category, region in found["regions"].items():
        terminal.show(f"region of {category}: {region}")
    for step in found["history"]:
        terminal.show(_step(step))
    if not found["history"]:
        terminal.show("no history: it was written by an earlier version")
    for name, file in found["files"].items():
        terminal.show(f"{name}: {file['bytes']:,} bytes, {file['sha256'][:12]}")
    return ALL_NORMAL


def diff(terminal: Terminal, bundle: options.Bundle, other: Other) -> int:
    """Print what differs between two bundles: settings, subclasses, thresholds, data, files and history."""
    from normweave.contents import differences

    found = differences(bundle, other)
    if terminal.json:
        terminal.record(found)
        return ALL_NORMAL
    if not found:
        terminal.show("no difference")
    for part in ("settings", "data"):
        for key, (old, new) in found.get(part, {}).items():
            terminal.show(f"{part}: {key} {old} -> {new}")
    for category, (old, new) in found.get("regions", {}).items():
        terminal.show(f"region of {category}: {old} -> {new}")
    for name, (old, _) in found.get("subclasses", {}).items():
        terminal.show(f"subclass {name}: only in the {'first' if old else 'second'}")
    for name, (old, new) in found.get("operating_points", {}).items():
        before, after = ("none" if each is None else f"{each['threshold']:.4f}" for each in (old, new))
        terminal.show(f"threshold of {name}: {before} -> {after}")
    if images := found.get("images"):
        terminal.show(f"images: {images['only_first']} only in the first, {images['only_second']} only in the second")
    for name, (old, new) in found.get("files", {}).items():
        before, after = ("none" if each is None else each[:12] for each in (old, new))
        terminal.show(f"file {name}: {before} -> {after}")
    for key, where in (("history", "second"), ("history_only_first", "first")):
        for step in found.get(key, []):
            terminal.show(f"only in the {where}: {_step(step)}")
    if "record" in found:
        terminal.show(f"other parts of bundle.json differ: {', '.join(found['record']) or 'its form only'}")
    return ALL_NORMAL


def verify(terminal: Terminal, bundle: options.Bundle) -> int:
    """Compare the hash of every file, and the scores of the stored images with the recorded ones.

    Exit code 2 if a file is damaged, 3 if the graph gives other scores on this machine.
    """
    from normweave.contents import verify as compare

    found = compare(bundle, threads=terminal.threads, device=terminal.device)
    if terminal.json:
        terminal.record(found)
        return ALL_NORMAL
    terminal.show(f"{found['bundle']}: {found['files']} files have the recorded hash")
    check = found["check"]
    if check is None:
        terminal.show("The bundle holds no images to compare scores on (--no-references, or an earlier version).")
        return ALL_NORMAL
    terminal.show(
        f"scores of {check['tiles']} stored images agree; {check['same_bits']} in every bit, the largest difference is "
        f"{check['largest_difference']:.2g} of the value"
    )
    return ALL_NORMAL


def _step(step: dict[str, Any]) -> str:
    """Return a step of the history as text; ? for what an edited record lacks."""
    what = f"{step['action']} {step['subclass']}" if "subclass" in step else step["action"]
    user = f" by {step['user']}" if step.get("user") else ""
    parent = f", from {step['parent']:.12}" if step.get("parent") else ""
    command = f": {step['command']}" if step.get("command") else ""
    date, images, software = (step.get(key, "?") for key in ("date", "images", "software"))
    return f"{date} {what}{user}, {images} images{parent}, normweave {software}{command}"
