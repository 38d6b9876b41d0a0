"""What an architecture tells the harness: the entry of `MODEL_REGISTRY`.

Torch-free to import, like everything that the launcher's preflight reads: the callables import what they need
when they are called.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from models.trained import EVERYTHING, Trained

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from torch import Tensor, nn

    from models.base import MultimodalModel
    from models.weight_map import CheckpointSlice, WeightMap


@dataclass(frozen=True)
class BatchShape:
    """What a micro-batch's FLOPs depend on.

    document_lengths: length of each document in tokens, without padding.
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


class ModelConfig(Protocol):
    """One model of an architecture: its numbers, and how they are spelled elsewhere."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        ...

    def to_flags(self) -> list[str]:
        """Megatron's flags for it, put before the user's own."""
        ...

    def with_flags(self, args: Namespace) -> Self:
        """What explicit flags make of it.

        Args:
            args: a complete command line's, under argparse's names.

        Raises:
            ValueError: a value that no model of this architecture has; the message names the flag.
        """
        ...

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that every checkpoint carries."""
        ...


class BuildModel[C: ModelConfig](Protocol):
    def __call__(
        self,
        args: Namespace,
        config: C,
        language_config: TransformerConfig,
        *,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        pg_collection: ProcessGroupCollection,
    ) -> MultimodalModel: ...


class BuildInputs[C: ModelConfig](Protocol):
    def __call__(self, config: C, trained: Trained = EVERYTHING) -> ModelInputs: ...


@dataclass(frozen=True)
class HfWeights[C: ModelConfig]:
    """An architecture's weights in HuggingFace folders and in checkpoints.

    model_types: values of `config.json`'s `model_type` that this is the table of.
    differences: the model of the flags and a folder's -> where they disagree, each with both values.
    as_stored: a config and a folder's tensor names -> the config that these bear out, and notices why it differs.
    language_model: a config -> the same model without its vision encoder.
    mapping: a config and the names of a folder's tensors (none: as the released folders store them) -> the table.
    as_exported: a config and the dtypes of a folder's tensors -> the same by the names of an export of what was trained
        from it.
    parameters: a config and a model stage of this rank -> its parameters by canonical name.
    checkpoint_slices: a config and its table -> where a `torch_dist` checkpoint keeps each canonical parameter.
    fsdp_checkpoint_slices: the same for an `fsdp_dtensor` checkpoint: each parameter's alternatives, by who wrote it.
    dtype: a tensor's name -> its dtype in released folders, as safetensors spells it.
    is_wide: a tensor's name -> whether a 16-bit run holds it in float32.
    linears: a table -> canonical names of the weights that HuggingFace has as linear modules.
    groups: name of a part of the model, for `--freeze` and `--lr-mult` -> regular expression that finds its tensors.
    """

    model_types: tuple[str, ...]
    differences: Callable[[C, C], list[str]]
    as_stored: Callable[[C, Iterable[str]], tuple[C, list[str]]]
    language_model: Callable[[C], C]
    mapping: Callable[[C, Iterable[str]], WeightMap]
    as_exported: Callable[[C, Mapping[str, str]], dict[str, str]]
    parameters: Callable[[C, nn.Module], Iterator[tuple[str, nn.Parameter]]]
    checkpoint_slices: Callable[[C, WeightMap], Mapping[str, tuple[CheckpointSlice, ...]]]
    fsdp_checkpoint_slices: Callable[[C, WeightMap], Mapping[str, list[tuple[CheckpointSlice, ...]]]]
    dtype: Callable[[str], str]
    is_wide: Callable[[str], bool]
    linears: Callable[[WeightMap], list[str]]
    groups: Mapping[str, str]


@dataclass(frozen=True)
class ModelSpec[C: ModelConfig]:
    """One architecture. Register it with `MODEL_REGISTRY["name"] = ModelSpec(...)`.

    A run's config is made once, by the preflight: a variant's or a folder's, and what flags changed of it
    (`ModelConfig.with_flags`). Everything below is handed that one.

    variants: by the names that `--model-variant` takes, the first the default.
    from_hf: a `config.json` -> the model that it describes. Raises ValueError, naming the key.
    check_layout: the flags of a complete command line and the model -> refusals, each naming the flag and the fix.
    check_kernels: raises on a rank whose kernels compute wrongly; called on its device, before a stage is built.
    build_model: builds one pipeline stage. It may change `language_config` where no Megatron flag says what it needs.
    model_inputs: what the loader's workers compute for this model, FLOPs of what is trained included.
    hf_weights: HuggingFace weights in and out; None refuses `--load-hf` and `--save-hf`.
    """

    variants: Mapping[str, C]
    from_hf: Callable[[Mapping[str, Any]], C]
    check_layout: Callable[[Namespace, C], list[str]]
    check_kernels: Callable[[Namespace, C], None]
    build_model: BuildModel[C]
    model_inputs: BuildInputs[C]
    hf_weights: HfWeights[C] | None = None

    @property
    def table(self) -> HfWeights[C]:
        """`hf_weights`, where something was asked for that needs it.

        Raises:
            ValueError: the architecture has none; the preflight refuses the flags that need one.
        """
        if self.hf_weights is None:
            raise ValueError("the architecture has no table of HuggingFace weights")
        return self.hf_weights
