"""The server scores, stores and shows images under the region of interest of its bundle."""

import asyncio
import io
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, RegionConfig, ShapesConfig, TimmConfig
from normweave.data import images, regions
from normweave.detector import Detector
from normweave.serve import candidate
from normweave.serve.config import ServeConfig
from normweave.serve.files import Files
from normweave.serve.service import InspectionService, Upload
from normweave.serve.store import Store
from normweave.settings import from_dict

PART = RegionConfig(include=ShapesConfig(polygons=(((0.0, 0.0), (0.6, 0.0), (0.3, 0.9), (0.0, 0.9)),)))


def png(pixels):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def with_region(cloth, tmp_path_factory):
    fitted = Detector.fit(
        cloth,
        config=Config(
            data=DataConfig(subclass_from="column", calibration="split"),
            prepare=PrepareConfig(height=64, width=64, tile_beyond=1),
            regions=(PART,),
            features=TimmConfig(weights="random", strides=(8,), batch_images=4),
            head=from_dict({"head": {"kind": "adapted_moe", "expert": {"kind": "gaussian"}}}).head,
            outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
        ),
        use_cache=False,
        device="cpu",
    )
    folder = fitted.save(tmp_path_factory.mktemp("regions") / "part.bundle")
    return Detector.load(folder, threads=1, device="cpu")


def test_what_lies_outside_changes_no_stored_bit(with_region, photos, tmp_path):
    """Neither of an image nor of one that is cut into tiles, in the server and in the process of a candidate."""
    small = images.decode(photos[0])
    config = ServeConfig()
    with closing(Store.open(f"sqlite:///{tmp_path}/store.sqlite")) as store, closing(Files(tmp_path / "f")) as files:
        service = InspectionService(with_region, store=store, files=files, config=config)
        try:
            for pixels in (small, np.tile(small, (1, 4, 1))):
                inside = regions.mask(regions.of([PART], None), *pixels.shape[:2])
                noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
                uploads = [Upload("a.png", png(each)) for each in (pixels, np.where(inside[..., None], pixels, noise))]
                (one,), (other,) = (
                    asyncio.run(service.inspect([each], source="api", actor="test")) for each in uploads
                )
                assert one.image.grids_hash == other.image.grids_hash
                assert one.image.image_hash != other.image.image_hash
                assert one.outcome.pred_score == other.outcome.pred_score
                assert one.outcome.as_dict() | {"latency_ms": 0} == other.outcome.as_dict() | {"latency_ms": 0}
                stored = service.store.inspection(one.id).image
                shown = asyncio.run(service.render(stored, lambda reader: (reader.inside(), reader.anomaly_map())))
                np.testing.assert_array_equal(shown[0], inside)
                assert (shown[1][~inside] < stored.map_threshold).all()
                (expected,) = with_region.score([pixels])
                np.testing.assert_allclose(shown[1][inside], expected.anomaly_map[inside], rtol=1e-4, atol=1e-5)
                judged = [candidate.judge(with_region, upload.content) for upload in uploads]
                assert judged[0][1] == judged[1][1] == files.read(stored.grids_hash)
        finally:
            service.stop()
