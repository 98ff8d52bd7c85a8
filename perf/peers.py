"""anomalib's PatchCore and PaDiM on the backbone whose weights pip carries, fitted and exported by their own calls."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.models import Padim, Patchcore
from numpy.typing import NDArray

from normweave.data import images
from normweave.features import weights as packaged

BACKBONE = "tf_efficientnet_lite0"
# Stages as in their defaults: PatchCore strides 8 and 16, PaDiM 4, 8 and 16 (timm counts from stride 2).
PEERS: dict[str, tuple[type, dict[str, Any]]] = {
    "patchcore": (Patchcore, {"layers": [2, 3]}),
    "padim": (Padim, {"layers": [1, 2, 3], "n_features": 100}),
}


def pixels(path: str) -> NDArray[np.float32]:
    """As their graphs take an image, (1, 3, H, W) in 0..1; they resize and normalise themselves."""
    return images.decode(path).transpose(2, 0, 1)[None].astype(np.float32) / 255


@lru_cache
@torch.no_grad()
def fitted(name: str, paths: tuple[str, ...]) -> Any:
    """The Lightning module, fitted on good images."""
    kind, settings = PEERS[name]
    module = kind(backbone=BACKBONE, pre_trained=False, **settings)
    model = module.model
    network = model.feature_extractor.feature_extractor
    whole = timm.create_model(BACKBONE, pretrained=False).state_dict()
    weights = packaged.read_packaged(BACKBONE, {key: tensor.shape for key, tensor in whole.items()})
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
    prepared = [module.pre_processor.transform(torch.from_numpy(pixels(path))) for path in paths]
    model.train()
    for one in prepared:
        model(one)
    if name == "patchcore":
        model.subsample_embedding(0.1)
    else:
        model.fit()
    module.eval()
    said = [model(one) for one in prepared]
    scores = torch.stack([one.pred_score.flatten()[0] for one in said])
    maps = torch.cat([one.anomaly_map.flatten() for one in said])
    after = module.post_processor
    after.image_min, after.image_max = scores.min(), scores.max()
    after.pixel_min, after.pixel_max = maps.min(), maps.max()
    after._image_threshold, after._pixel_threshold = scores.max(), maps.max()
    return module


def onnx(module: Any, folder: Path, *, batch: int | None = None) -> Path:
    """Its graph by its own export, for 256 x 256 pixels; None: of any batch."""
    fixed: dict[str, Any] = {} if batch is None else {"dynamic_axes": None, "dynamic_shapes": None}
    return Path(module.to_onnx(folder, input_size=(256, 256), **fixed))
