"""How Megatron's `pretrain()` gets the model: its own `get_model`, and then our hooks on the wrapped stages.

A model builder is the one place that megatron-core offers between wrapping (DDP, FSDP) and building the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training.models.base import ModelBuilder, ModelConfig, compose_hooks
from torch import nn

from models.base import MultimodalModel


@dataclass
class ProvidedModelConfig(ModelConfig):
    """A model that a provider function builds.

    provider: builds one pipeline stage (`pretrain_multimodal.model_provider`).
    post_wrap_hooks: called with all wrapped stages of this rank, before the optimizer is built.
    """

    builder: ClassVar[str] = "runtime.model_builder.ProvidedModelBuilder"
    provider: Callable[..., MultimodalModel] = field(kw_only=True)


class ProvidedModelBuilder(ModelBuilder):
    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MultimodalModel:
        return self._model_config.provider(pre_process, post_process, vp_stage=vp_stage, pg_collection=pg_collection)

    def build_distributed_models(
        self, pg_collection: ProcessGroupCollection, *, wrap_with_ddp: bool = True, **_: Any
    ) -> list[nn.Module]:
        """The other arguments repeat what `get_model` reads from Megatron's arguments."""
        from megatron.training.training import get_model

        config = self._model_config
        stages = get_model(
            config.provider, ModelType.encoder_or_decoder, wrap_with_ddp=wrap_with_ddp, pg_collection=pg_collection
        )
        return compose_hooks(config.post_wrap_hooks)(stages)


def unwrapped(chunk: nn.Module) -> MultimodalModel:
    """The model in its wrappers. megatron-core's `unwrap_model` stops before the last one of Megatron-FSDP's two."""
    return unwrap_model(chunk.module.module if isinstance(chunk, FullyShardedDataParallel) else chunk)
