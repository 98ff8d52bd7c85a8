"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[Path, typer.Argument(help="A manifest (.csv, .parquet) or a folder of images.", show_default=False)]
Bundle = Annotated[Path, typer.Argument(help="Folder written by 'normweave train'.", show_default=False)]
OneBundle = Annotated[
    Path | None, typer.Argument(metavar="BUNDLE", help="Folder written by 'normweave train'.", show_default=False)
]
Category = Annotated[
    list[str] | None,
    typer.Option("--category", help="Category to use, or all. Repeatable.", show_default="all"),
]
Subclass = Annotated[
    list[str] | None,
    typer.Option("--subclass", help="Subclass to use, or all. Repeatable.", show_default="all"),
]
Layout = Annotated[
    str | None,
    typer.Option(help="Layout of the folder: mvtec_ad, visa, folders, …", show_default="recognized"),
]
FalseAlarmRate = Annotated[
    float | None, typer.Option(help="Highest share of new normal images with the verdict anomalous, 0 to 1.")
]
Cache = Annotated[Path | None, typer.Option(help="Folder of the feature cache.", show_default="in the user's cache")]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|local",
        help="Use a Ray cluster: host:port of its head node, auto, or local for all processors of this machine.",
        show_default=False,
    ),
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Do not cache features on disk; training takes several times as long.")
]


def chosen(names: list[str] | None) -> tuple[str, ...]:
    """Return the names as settings, in which an empty tuple means all."""
    return () if not names or "all" in names else tuple(names)
