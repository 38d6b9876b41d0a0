"""What an architecture tells the harness: the entry of `MODEL_REGISTRY`.

Torch-free to import, like everything that the launcher's preflight reads: the callables import what they need
when they are called.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from torch import Tensor, nn

    from models.base import MultimodalModel
    from models.weight_map import CheckpointSlice, WeightMap


@dataclass(frozen=True)
class BatchShape:
    """What a micro-batch's FLOPs depend on.

    document_lengths: padded length of each document (THD) or row (BSHD), in tokens.
    grid_thw: [I, 3] int64, patches per image in time, height and width.
    trained: how many tokens' next token is trained, and how many's further ones (`ModelInputs.further_tokens`): the
        output layer runs on these alone. Empty: on all tokens.
    """

    document_lengths: tuple[int, ...]
    grid_thw: Tensor
    trained: tuple[int, ...] = ()


class ModelInputs(Protocol):
    """What a model computes from token ids and grids alone. Called in the loader's workers: no device, picklable."""

    @property
    def image_token_id(self) -> int: ...

    @property
    def merge_size(self) -> int:
        """One vision feature stands for merge_size x merge_size patches."""
        ...

    @property
    def patch_dim(self) -> int:
        """Values per patch row of pixel_values."""
        ...

    @property
    def patch_size(self) -> int:
        """A patch's height and width in pixels."""
        ...

    @property
    def further_tokens(self) -> int:
        """Tokens behind the next one that the model is trained to predict: MTP's depths."""
        ...

    def position_ids(self, input_ids: Tensor, grid_thw: Tensor) -> Tensor:
        """[L] int64 and [I, 3] int64 of one document -> its [3, L] int64 positions."""
        ...

    def vision_inputs(self, grid_thw: Tensor) -> dict[str, Tensor | int]:
        """[I, 3] int64 -> the vision encoder's keyword arguments besides pixel_values."""
        ...

    def pad_vision(self, vision: dict[str, Tensor | int], patches: int, frames: int) -> dict[str, Tensor | int] | None:
        """The vision encoder's keyword arguments, pixel_values among them, padded to a number of patches and frames.

        Features of the padding come behind the real ones. None where there are more patches or frames already.
        """
        ...

    def flops(self, shape: BatchShape) -> float:
        """Floating-point operations of forward and backward of one micro-batch, over all ranks that share it.

        Of a single image without documents too: context-parallel ranks share the images by this cost.
        """
        ...


class BuildModel(Protocol):
    def __call__(
        self,
        args: Namespace,
        language_config: TransformerConfig,
        vision_config: TransformerConfig,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        pg_collection: ProcessGroupCollection,
    ) -> MultimodalModel: ...


@dataclass(frozen=True)
class HfWeights:
    """An architecture's weights in HuggingFace folders and in checkpoints. A config is a `config.json`.

    model_types: values of a config's `model_type` that this is the table of.
    mismatches: resolved flags and a folder's config -> where they disagree, each with both values.
    mapping: a config and the names of a folder's tensors (none: as the released folders store them) -> the table.
    parameters: a config and a model stage of this rank -> its parameters by canonical name.
    checkpoint_slices: a config and its table -> where a `torch_dist` checkpoint keeps each canonical parameter.
    fsdp_checkpoint_slices: the same for an `fsdp_dtensor` checkpoint: each parameter's alternatives, by who wrote it.
    dtype: a tensor's name -> its dtype in released folders, as safetensors spells it.
    vocab_size: a config -> rows of the embedding.
    model_inputs: a config -> what is computed from token ids and grids, for data that is read without a command line.
    """

    model_types: tuple[str, ...]
    mismatches: Callable[[Namespace, Mapping[str, Any]], list[str]]
    mapping: Callable[[Mapping[str, Any], Iterable[str]], WeightMap]
    parameters: Callable[[Mapping[str, Any], nn.Module], Iterator[tuple[str, nn.Parameter]]]
    checkpoint_slices: Callable[[Mapping[str, Any], WeightMap], Mapping[str, tuple[CheckpointSlice, ...]]]
    fsdp_checkpoint_slices: Callable[[Mapping[str, Any], WeightMap], Mapping[str, list[tuple[CheckpointSlice, ...]]]]
    dtype: Callable[[str], str]
    vocab_size: Callable[[Mapping[str, Any]], int]
    model_inputs: Callable[[Mapping[str, Any]], ModelInputs]


@dataclass(frozen=True)
class ModelSpec:
    """One architecture. Register it with `MODEL_REGISTRY["name"] = ModelSpec(...)`.

    variants: names that `--model-variant` takes, the first the default.
    flags: variant name and the launcher's architecture overrides -> Megatron flags, put before the user's own.
    flags_from_hf: a folder with config.json -> the same.
    check_layout: parsed flags (argparse names of Megatron's) -> refusals, each naming the flag and the fix.
    check_kernels: raises on a rank whose kernels compute wrongly; called on its device, before a stage is built.
    hf_config: resolved arguments -> the `config.json` that every checkpoint carries.
    vision_config: arguments and the decoder's config -> the vision encoder's config.
    language_post_config: last word on the decoder's config, for what no Megatron flag can say.
    build_model: builds one pipeline stage.
    model_inputs: arguments -> what the loader's workers compute for this model, FLOPs included.
    hf_weights: HuggingFace weights in and out; None refuses `--load-hf` and `--save-hf`.
    """

    variants: tuple[str, ...]
    flags: Callable[[str], list[str]]
    flags_from_hf: Callable[[Path], list[str]]
    check_layout: Callable[[Namespace], list[str]]
    check_kernels: Callable[[Namespace], None]
    hf_config: Callable[[Namespace], dict[str, Any]]
    vision_config: Callable[[Namespace, TransformerConfig], TransformerConfig]
    language_post_config: Callable[[Namespace, TransformerConfig], TransformerConfig]
    build_model: BuildModel
    model_inputs: Callable[[Namespace], ModelInputs]
    hf_weights: HfWeights | None = None
