"""`MODEL_REGISTRY`: what `--model-arch` looks up. docs/architecture.md shows how to add an architecture."""

from models.qwen35_vl.factory import QWEN35_VL
from models.spec import BatchShape, ModelInputs, ModelSpec

MODEL_REGISTRY: dict[str, ModelSpec] = {"qwen35_vl": QWEN35_VL}

__all__ = ["MODEL_REGISTRY", "BatchShape", "ModelInputs", "ModelSpec"]
