"""Settings of CNC."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from normweave.config.base import BaseHeadConfig, Border, TrainingConfig
from normweave.config.features import OfflinePairConfig
from normweave.validation import (
    NaturalFloat,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Share,
    check,
    checked,
    unused,
)


@checked
class GatingConfig:
    """The gated mixture of experts of CNC."""

    experts: PositiveInt = 5
    top_k: PositiveInt = 2
    """Experts used for a patch."""
    balance: NaturalFloat = 0.01
    """Weight of the load-balance loss."""

    def __post_init__(self) -> None:
        check((self.top_k <= self.experts, f"top_k must be at most experts ({self.experts}), got {self.top_k}"))


@checked
class PromptsConfig:
    """The prompts of CNC and the losses that use them."""

    text: Literal["auto", "learned", "free", "random", "off"] = "auto"
    """`learned`: a learnable context read by the text encoder; `free`: learnable vectors without a text; `random`:
    random vectors; `off`: none; `auto`: learned where the features have a text side, else free."""
    context_words: PositiveInt = 8
    """Learnable words before each state."""
    normal_states: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "normal flawless surface",
        "perfect texture",
        "clean unbroken material",
    )
    """Descriptions of a normal patch of any category; the guide uses the first."""
    abnormal_states: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "damaged surface with a defect",
        "a scratch",
        "a hole",
        "a stain",
        "a crack",
    )
    """Descriptions of an anomalous patch."""
    temperature: PositiveFloat = 0.07
    """Temperature of the softmax over prompts; the paper's 0.001 is for CLIP's own scale."""
    joint_levels: tuple[int, ...] = ()
    """Levels that the text losses use, from 0; empty = all."""
    distillation: NaturalFloat = 0.1
    """Weight of the cross-modal feature distillation."""
    promotion: NaturalFloat = 0.03
    """Weight of the normality promotion."""
    weight: NaturalFloat = 0.25
    """beta: weight of the text score, added to the reconstruction score; both are standardised on held-out normals."""
    training: TrainingConfig = TrainingConfig(epochs=15, batch_images=8, learning_rate=5e-3)


@checked
class GuideConfig:
    """The normality guide of CNC: patches are decoded as mixtures of tokens of the normal state."""

    tokens: Literal["text", "free", "off"] = "off"
    """`text`: outputs of the text encoder at learnable words, in a prompt of the first normal state; `free`: learnable
    tokens without text; `off`: no guide."""
    words: Annotated[int, Field(ge=2)] = 16
    """M, number of tokens."""
    residual: Share = 0.0
    """Weight of the residual connection around the guide; 0 = none."""

    def __post_init__(self) -> None:
        if self.tokens == "off":
            check(*unused(self, "words residual", why="tokens=off"))


@checked
class SyntheticConfig:
    """Synthetic anomalies that CNC trains on."""

    variants: NaturalInt = 2
    """Synthetic anomalies made of each fit image; 0 = trained on normal images only, as the paper."""
    share: Share = 0.75
    """Share of the images of a step that are synthetic anomalies."""
    covered: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a cell that must be anomalous for the cell to count as anomalous for the prompts."""

    def __post_init__(self) -> None:
        if self.variants == 0:
            check(*unused(self, "share covered", why="variants=0"))


@checked
class CNCConfig(BaseHeadConfig):
    """CNC (arXiv 2501.00346): one decoder for all categories, constrained by prompts of the normal state."""

    implementation = "cnc.head:CNC"
    model = "cnc"
    features = OfflinePairConfig
    kind: Literal["cnc"] = "cnc"
    width: PositiveInt = 96
    """d, size of a token in the decoder."""
    blocks: PositiveInt = 1
    """Number of transformer blocks per level."""
    heads: PositiveInt = 4
    """Number of attention heads; each has d / heads channels."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the fused tokens in training."""
    bottleneck: NaturalInt = 0
    """Width of a linear bottleneck behind the experts; 0 = none."""
    moe: bool = True
    """A gated mixture of experts over the patch tokens."""
    gating: GatingConfig = GatingConfig()
    prompts: PromptsConfig = PromptsConfig()
    guide: GuideConfig = GuideConfig()
    synthetic: SyntheticConfig = SyntheticConfig()
    per_subclass: bool = True
    """Bring each level's map to mean 0 and std 1 over the held-out normals of the nearest subclass."""
    border: Border = 1
    precision: Literal["32", "bf16"] = "32"
    """Precision of the decoder in training. With bf16, losses and gating logits still have 32 bits."""
    training: TrainingConfig = TrainingConfig(epochs=20, batch_images=8, learning_rate=1e-3)

    def __post_init__(self) -> None:
        rules = [
            (
                self.width % self.heads == 0,
                f"width must be a multiple of heads ({self.heads}), got {self.width}",
            )
        ]
        if not self.moe:
            rules += unused(self, "gating", why="moe=false")
        check(*rules)
