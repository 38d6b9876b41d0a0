"""Qwen3.5's vision transformer on megatron-core layers: patches in, features as wide as the decoder out.

Numerics follow transformers' `Qwen3_5VisionModel`. Everything that depends on the grids alone (where to look up the
position table, 2D rotary positions, where each frame begins) is computed by `inputs.vision_inputs` in the loader's
workers, so that the forward pass has no loop over images and waits for nothing on the host.
Shapes: I images, F frames, P patches, V features (P / merge^2), H the ViT's width, D its head dimension.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from models.backends.backend import Backend
from models.common.attention import RotarySelfAttention
from models.common.block import PartlyTrainedBlock
from models.qwen35_vl.configuration import Qwen35VLVisionConfig

NORM_EPSILON = 1e-6
ROTARY_BASE = 10_000.0

# How to run, as opposed to what to build: the ViT does these as the decoder does.
_SHARED_SETTINGS = (
    "tensor_model_parallel_size",
    "perform_initialization",
    "use_cpu_initialization",
    "init_model_with_meta_device",
    "init_method_std",
    "use_te_rng_tracker",
    "fp16",
    "bf16",
    "params_dtype",
    "enable_autocast",
    "autocast_dtype",
    "disable_bf16_reduced_precision_matmul",
    "gradient_accumulation_fusion",
    "bias_dropout_fusion",
    "deterministic_mode",
    "attention_backend",
    "flash_attention_version",
    "transformer_impl",
)


def vision_transformer_config(language_config: TransformerConfig, vision: Qwen35VLVisionConfig) -> TransformerConfig:
    """The ViT's megatron-core configuration.

    Built from nothing rather than copied from the decoder's and reset, so that no MoE, GatedDeltaNet, MTP, pipeline,
    context-parallel or fp8 setting can leak in; `_SHARED_SETTINGS` lists what the two have in common. No sequence
    parallelism: patches aren't padded to TP. Recomputation is off; the caller sets it.
    """
    return TransformerConfig(
        **{name: getattr(language_config, name) for name in _SHARED_SETTINGS},
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.ffn_hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=NORM_EPSILON,
        activation_func=partial(F.gelu, approximate="tanh"),
        add_bias_linear=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def vision_block_spec(config: TransformerConfig, backend: Backend) -> TransformerBlockSubmodules:
    """Layers of the ViT for either backend; no norm behind the last one, since the merger has its own."""
    fused = backend.fuse_layernorm_and_linear()
    norm = IdentityOp if fused else backend.layer_norm(rms_norm=False)
    norm_linear = backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear()
    # Checkpoints carry the fused backend's names, so that either backend reads the other's.
    checkpoint_names = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=RotarySelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=norm_linear,
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=norm_linear, linear_fc2=backend.row_parallel_linear()),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused else checkpoint_names,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers)


class PatchEmbedding(nn.Module):
    """Flattened patches to the ViT's width: HF's Conv3d with stride equal to its kernel, as the product it is."""

    def __init__(self, config: TransformerConfig, patch_dim: int) -> None:
        super().__init__()
        factory = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.hidden_size, patch_dim, **factory))
        self.bias = nn.Parameter(torch.empty(config.hidden_size, **factory))
        if config.perform_initialization:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.config.init_method(self.weight)
        self.bias.zero_()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[P, C * temporal patch * patch^2] -> [P, H]."""
        return F.linear(pixel_values.to(self.weight.dtype), self.weight, self.bias)


class PositionTable(nn.Module):
    """A square table of learned positions, read between its points to fit each image's grid."""

    def __init__(self, config: TransformerConfig, rows: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(
            torch.empty(rows, config.hidden_size, device=torch.cuda.current_device(), dtype=config.params_dtype)
        )
        if config.perform_initialization:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.config.init_method(self.weight)

    def forward(self, index: Tensor, weight: Tensor) -> Tensor:
        """[P, 4] int64 rows and [P, 4] float32 weights -> [P, H] in the table's dtype, summed in float32."""
        corners = F.embedding(index, self.weight) * weight.unsqueeze(-1)  # [P, 4, H]
        return corners.sum(dim=1).to(self.weight.dtype)


class PatchMerger(MegatronModule):
    """merge^2 neighbouring patches to one feature of the decoder's width, sharded by TP like an MLP."""

    def __init__(
        self,
        config: TransformerConfig,
        backend: Backend,
        *,
        merge_size: int,
        out_hidden_size: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config=config)
        self.merged_size = config.hidden_size * merge_size**2
        self.norm = backend.layer_norm(rms_norm=False)(config=config, hidden_size=config.hidden_size, eps=NORM_EPSILON)
        shared = {"config": config, "is_expert": False, "tp_comm_buffer_name": None, "tp_group": tp_group}
        self.linear_fc1 = backend.column_parallel_linear()(
            self.merged_size,
            self.merged_size,
            init_method=config.init_method,
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            **shared,
        )
        self.linear_fc2 = backend.row_parallel_linear()(
            self.merged_size,
            out_hidden_size,
            init_method=config.output_layer_init_method,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            **shared,
        )

    def forward(self, patches: Tensor) -> Tensor:
        """[P, 1, H], the patches of one feature next to each other -> [V, out_hidden_size]."""
        merged = self.norm(patches).reshape(-1, 1, self.merged_size)
        hidden, _ = self.linear_fc1(merged)
        features, _ = self.linear_fc2(F.gelu(hidden))  # exact, where the blocks use the tanh form
        return features.squeeze(1)


class VisionEncoder(MegatronModule):
    """Patches to features. Replicated over CP and pipeline stages, sharded by TP without sequence parallelism.

    Args:
        config: from `vision_transformer_config`.
        vision: the ViT's architecture.
        backend: what layers are made of.
        out_hidden_size: the decoder's width.
        pg_collection: the decoder's process groups, of which the ViT uses TP.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vision: Qwen35VLVisionConfig,
        backend: Backend,
        *,
        out_hidden_size: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.pg_collection = pg_collection
        self.patch_embed = PatchEmbedding(config, vision.patch_dim)
        self.pos_embed = PositionTable(config, vision.num_position_embeddings)
        self.decoder = PartlyTrainedBlock(
            config,
            vision_block_spec(config, backend),
            post_layer_norm=False,
            pg_collection=_vision_groups(pg_collection),
        )
        self.merger = PatchMerger(
            config,
            backend,
            merge_size=vision.spatial_merge_size,
            out_hidden_size=out_hidden_size,
            tp_group=pg_collection.tp,
        )

    def forward(
        self,
        pixel_values: Tensor,
        position_index: Tensor,
        position_weight: Tensor,
        patch_position: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
    ) -> Tensor:
        """Encode a micro-batch's images.

        Args:
            pixel_values: [P, C * temporal patch * patch^2], in the order of HF's image processor: merge x merge
                neighbours next to each other.
            The others: see `vision_inputs`.

        Returns:
            [V, out_hidden_size] in params_dtype.
        """
        patches = self.patch_embed(pixel_values) + self.pos_embed(position_index, position_weight)
        patches = self.decoder(
            hidden_states=patches.unsqueeze(1),  # [P, 1, H]
            attention_mask=None,
            rotary_pos_emb=rotary_angles(patch_position, self.config.kv_channels),
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_kv=cu_seqlens,
                max_seqlen_q=max_seqlen,
                max_seqlen_kv=max_seqlen,
            ),
        )
        return self.merger(patches)


def rotary_angles(patch_position: Tensor, head_dim: int) -> Tensor:
    """2D rotary angles: half of the frequencies turn with the row, half with the column.

    Args:
        patch_position: [P, 2] int64 row and column.
        head_dim: D.

    Returns:
        [P, 1, 1, D] float32: rows, columns, and the two again for `rotate_half`.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=patch_position.device) / half
    angles = (patch_position.unsqueeze(-1).float() * (1.0 / ROTARY_BASE**exponents)).flatten(1)  # [P, D / 2]
    return torch.cat((angles, angles), dim=-1).view(-1, 1, 1, head_dim)


def _vision_groups(decoder: ProcessGroupCollection) -> ProcessGroupCollection:
    """The ViT's process groups: the decoder's TP, and CP and PP groups of this rank alone."""
    groups = ProcessGroupCollection()
    groups.tp = decoder.tp
    alone = [group for group in (decoder.cp, decoder.pp) if group.size() == 1]
    # Local synchronisation, because the ranks of other pipeline stages build no ViT and wouldn't join the call.
    groups.cp = groups.pp = (
        alone[0]
        if alone
        else torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    )
    return groups
