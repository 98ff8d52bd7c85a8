"""Options that several commands have in common."""

from pathlib import Path
from typing import Annotated

import typer

Data = Annotated[
    Path, typer.Argument(help="A manifest (.csv, .parquet) or a folder of images.", show_default=False)
]
Bundle = Annotated[Path, typer.Argument(help="Folder written by 'normweave train'.", show_default=False)]
Category = Annotated[
    list[str] | None,
    typer.Option("--category", help="Category to use, or all; may be repeated.", show_default="all"),
]
Subclass = Annotated[
    list[str] | None,
    typer.Option("--subclass", help="Subclass to use, or all; may be repeated.", show_default="all"),
]
Layout = Annotated[
    str | None,
    typer.Option(help="How the folder is laid out: mvtec_ad, visa, folders, …", show_default="recognised"),
]
FalseAlarmRate = Annotated[
    float | None, typer.Option(help="Share of new normal images that may be called anomalous, 0 to 1.")
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder for computed features.", show_default="in the user's cache")
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no features on disk; compute them anew.")]


def chosen(names: list[str] | None) -> tuple[str, ...]:
    """Names as the settings have them, where nothing stands for all."""
    return () if not names or "all" in names else tuple(names)
