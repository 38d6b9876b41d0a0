"""`MODEL_REGISTRY`: what `--model-arch` looks up. docs/architecture.md shows how to add an architecture."""

from typing import Any

from models.qwen35_vl.factory import QWEN35_VL
from models.spec import BatchShape, ModelConfig, ModelInputs, ModelSpec

MODEL_REGISTRY: dict[str, ModelSpec[Any]] = {"qwen35_vl": QWEN35_VL}

__all__ = ["MODEL_REGISTRY", "BatchShape", "ModelConfig", "ModelInputs", "ModelSpec"]
