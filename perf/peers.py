"""anomalib's PatchCore and PaDiM with the backbone of the pip package, fitted and exported by anomalib."""

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
    """Return an image as input of their graphs, (1, 3, H, W) in 0..1. They resize and normalize it."""
    return images.decode(path).transpose(2, 0, 1)[None].astype(np.float32) / 255


@lru_cache
@torch.no_grad()
def fitted(name: str, paths: tuple[str, ...]) -> Any:
    """Return the Lightning module, fitted on good images."""
    model_class, settings = PEERS[name]
    module = model_class(backbone=BACKBONE, pre_trained=False, **settings)
    model = module.model
    network = model.feature_extractor.feature_extractor
    state = timm.create_model(BACKBONE, pretrained=False).state_dict()
    weights = packaged.read_packaged(BACKBONE, {key: tensor.shape for key, tensor in state.items()})
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
    outputs = [model(one) for one in prepared]
    scores = torch.stack([one.pred_score.flatten()[0] for one in outputs])
    maps = torch.cat([one.anomaly_map.flatten() for one in outputs])
    after = module.post_processor
    after.image_min, after.image_max = scores.min(), scores.max()
    after.pixel_min, after.pixel_max = maps.min(), maps.max()
    after._image_threshold, after._pixel_threshold = scores.max(), maps.max()
    return module


def onnx(module: Any, folder: Path, *, batch: int | None = None) -> Path:
    """Export its graph for 256 x 256 pixels, with a fixed batch size or (None) a dynamic one."""
    fixed: dict[str, Any] = {} if batch is None else {"dynamic_axes": None, "dynamic_shapes": None}
    return Path(module.to_onnx(folder, input_size=(256, 256), **fixed))
