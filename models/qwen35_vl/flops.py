"""Floating-point operations of one Qwen3.5-VL micro-batch, forward and backward.

A multiply-add counts as two; backward as twice forward; recomputation isn't counted, so the figure is the model's,
not the hardware's. Decoder, GatedDeltaNet, ViT, MTP and output layer are in; norms, rotary and softmax are not.
"""

from __future__ import annotations

from models.qwen35_vl.configuration import Qwen35VLConfig, Qwen35VLVisionConfig
from models.spec import BatchShape

FORWARD_AND_BACKWARD = 3
MULTIPLY_ADD = 2


def batch_flops(config: Qwen35VLConfig, shape: BatchShape) -> float:
    """FLOPs of a micro-batch, over all ranks that share it."""
    tokens = sum(shape.document_lengths)
    attended = sum(length * (length + 1) // 2 for length in shape.document_lengths)  # causal pairs

    attention_layers = config.num_layers // config.full_attention_interval
    gdn_layers = config.num_layers - attention_layers
    mtp = config.mtp_num_layers
    macs = tokens * (
        gdn_layers * _gdn_macs(config)
        + (attention_layers + mtp) * _attention_projection_macs(config)
        + (config.num_layers + mtp) * _mlp_macs(config)
        + mtp * 2 * config.hidden_size**2  # [embedding, hidden] -> hidden
    )
    heads = sum(shape.trained) if shape.trained else (1 + mtp) * tokens
    macs += heads * config.hidden_size * config.vocab_size
    macs += (attention_layers + mtp) * attended * 2 * config.num_attention_heads * config.kv_channels
    macs += _vision_macs(config.vision, config.hidden_size, shape)
    return float(FORWARD_AND_BACKWARD * MULTIPLY_ADD * macs)


def _attention_projection_macs(config: Qwen35VLConfig) -> int:
    """Queries, their gates and the output projection count per query head; keys and values per group."""
    per_head = 3 * config.num_attention_heads + 2 * config.num_query_groups
    return config.hidden_size * config.kv_channels * per_head


def _gdn_macs(config: Qwen35VLConfig) -> int:
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    projections = config.hidden_size * (2 * keys + 2 * values + 2 * config.linear_num_value_heads + values)
    convolution = config.linear_conv_kernel_dim * (2 * keys + values)
    # The recurrence itself, per value head: read by key, write, read by query. A chunked kernel does more.
    recurrence = 3 * config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    return projections + convolution + recurrence


def _mlp_macs(config: Qwen35VLConfig) -> int:
    experts = config.experts
    if experts is None:
        return 3 * config.hidden_size * config.dense_ffn_hidden_size
    routed = 3 * config.hidden_size * experts.topk * experts.ffn_hidden_size
    shared = 3 * config.hidden_size * experts.shared_ffn_hidden_size + config.hidden_size
    return routed + shared + config.hidden_size * experts.count


def _vision_macs(vision: Qwen35VLVisionConfig, out_hidden_size: int, shape: BatchShape) -> int:
    frames = shape.grid_thw[:, 0]
    per_frame = shape.grid_thw[:, 1] * shape.grid_thw[:, 2]
    patches = int((frames * per_frame).sum())
    attended = int((frames * per_frame**2).sum())  # every patch of a frame sees every other
    merged_width = vision.hidden_size * vision.spatial_merge_size**2
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size
    features = patches // vision.spatial_merge_size**2
    return (
        patches * (vision.patch_dim * vision.hidden_size + vision.num_layers * layer)
        + vision.num_layers * attended * 2 * vision.hidden_size
        + features * (merged_width**2 + merged_width * out_hidden_size)
    )
