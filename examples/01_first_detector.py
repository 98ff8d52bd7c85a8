"""Train a detector on good images of cloth and score two new images, in under a minute on a CPU, without a download.

python examples/01_first_detector.py
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from normweave import Detector
from normweave.config import Config, PrepareConfig
from normweave.textiles import Textile, make_textures, render

CLOTH = Textile("plain", "ecru", "diffuse")


def main() -> None:
    """Train on good images, then score a good image and one with a knot, both new."""
    config = replace(Config(), prepare=PrepareConfig(height=128, width=128))
    with TemporaryDirectory() as folder:
        cloth = Path(folder) / "cloth"
        make_textures(cloth, size=(128, 128), train_images=60, test_images=0, defect_images=0, seen=[CLOTH], unseen=[])
        detector = Detector.fit(cloth, config=config, cache=Path(folder) / "features")
        detector.save(Path(folder) / "cloth.bundle")
        detector = Detector.load(Path(folder) / "cloth.bundle")

    for defect in (None, "knot"):
        sample = render(CLOTH, seed=12345, size=(128, 128), defect=defect)
        outcome = detector.score(sample.image)
        print(f"{defect or 'good'}: {outcome.verdict}, score {outcome.pred_score:.3f}, p-value {outcome.p_value:.3f}")


if __name__ == "__main__":
    main()
