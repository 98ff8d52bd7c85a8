"""From good pieces of cloth to verdicts, in under a minute on a processor; nothing to download.

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
    """Train on good pieces, then judge a good one and one with a knot; neither was in the training."""
    config = replace(Config(), prepare=PrepareConfig(height=128, width=128))
    with TemporaryDirectory() as folder:
        cloth = Path(folder) / "cloth"
        make_textures(
            cloth, size=(128, 128), train_images=60, test_images=0, defect_images=0, seen=[CLOTH], unseen=[]
        )
        detector = Detector.fit(cloth, config=config, use_cache=False)
        detector.save(Path(folder) / "cloth.bundle")
        detector = Detector.load(Path(folder) / "cloth.bundle")

    for defect in (None, "knot"):
        piece = render(CLOTH, seed=12345, size=(128, 128), defect=defect)
        outcome = detector.score(piece.image)
        print(
            f"{defect or 'good'}: {outcome.verdict}, score {outcome.pred_score:.3f}, p-value {outcome.p_value:.3f}"
        )


if __name__ == "__main__":
    main()
