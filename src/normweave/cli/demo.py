"""`normweave demo`: make data, train, evaluate and write a report in one command, without a download."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from normweave.cli.evaluate import report
from normweave.cli.terminal import Terminal


def demo(
    terminal: Terminal,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for data, bundle and report.")] = Path(
        "runs/demo"
    ),
    images: Annotated[int, typer.Option(min=8, help="Good training images of each of six subclasses.")] = 60,
) -> int:
    """Make synthetic textile images, train on six subclasses, test on these and on four unseen subclasses.

    The images of an earlier call with the same options are used again. Bundle and report are replaced.
    """
    from normweave.benchmark.evaluate import evaluate
    from normweave.config import Config
    from normweave.detector import Detector
    from normweave.textiles import DEFECTS, UNSEEN, make_textures

    seed = terminal.seed or 0
    test_images = max(2, images // 3)
    bundle = output / "cloth.bundle"
    with terminal.progress() as progress:
        terminal.remark(f"1/3  Making textile images with seed {seed}: {output / 'data'}")
        manifest = make_textures(
            output / "data",
            seed=seed,
            train_images=images,
            test_images=test_images,
            defect_images=len(DEFECTS) * max(1, test_images // len(DEFECTS)),
            progress=None if progress is None else lambda done, total: progress("making images", done, total),
        )
        terminal.remark(f"2/3  Training on good images of six subclasses: {bundle}")
        detector = Detector.fit(
            manifest,
            config=replace(Config(), seed=seed),
            cache=output / "features",
            device=terminal.device,
            progress=progress,
        )
        detector.save(bundle, overwrite=True)
        terminal.remark(f"3/3  Testing on seen and unseen subclasses: {output / 'report.html'}")
        metrics = evaluate(detector, manifest, output=output, title="Textiles, seen and unseen", progress=progress)
    exit_code = report(terminal, metrics, output)
    terminal.remark(
        f"Open {output / 'report.html'} in a browser. Predict images: "
        f"normweave predict {bundle} {output / 'data' / 'cloth' / UNSEEN[0].name / 'test'}"
    )
    return exit_code
