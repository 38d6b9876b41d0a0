"""The decoder alone, built straight from an architecture: no `megatron.training`, which takes long to import."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.qwen35_vl.configuration import Qwen35VLConfig


def decoder_config(architecture: Qwen35VLConfig, dtype: torch.dtype = torch.float32, **changes: Any):
    """The `TransformerConfig` that the architecture's Megatron flags resolve to."""
    from megatron.core.transformer import TransformerConfig

    moe = {}
    if architecture.is_moe:
        moe = {
            "num_moe_experts": architecture.num_experts,
            "moe_router_topk": architecture.moe_router_topk,
            "moe_ffn_hidden_size": architecture.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": architecture.moe_shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.0,
            "moe_router_dtype": "fp32",
            "moe_token_dispatcher_type": "alltoall",
        }
    values = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.dense_ffn_hidden_size,
        "num_attention_heads": architecture.num_attention_heads,
        "num_query_groups": architecture.num_query_groups,
        "kv_channels": architecture.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_epsilon,
        "layernorm_zero_centered_gamma": True,
        "init_method_std": architecture.init_method_std,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "qk_layernorm": True,
        "attention_output_gate": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": architecture.full_attention_interval,
        "linear_conv_kernel_dim": architecture.linear_conv_kernel_dim,
        "linear_key_head_dim": architecture.linear_key_head_dim,
        "linear_value_head_dim": architecture.linear_value_head_dim,
        "linear_num_key_heads": architecture.linear_num_key_heads,
        "linear_num_value_heads": architecture.linear_num_value_heads,
        "mtp_num_layers": architecture.mtp_num_layers or None,
        "mrope_section": list(architecture.mrope_section),
        "calculate_per_token_loss": True,
        "transformer_impl": "local",
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        **moe,
    }
    config = TransformerConfig(**(values | changes))
    config.position_embedding_type = "mrope"
    config.rotary_base = architecture.rotary_base
    return config


def build_decoder(architecture: Qwen35VLConfig, dtype: torch.dtype = torch.float32, **changes: Any):
    """The whole decoder on one rank, in training mode; needs the fixture `single_rank`."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from models.backends import get_backend
    from models.common.gpt import MultimodalGPTModel
    from models.qwen35_vl.specs import decoder_block_spec, mtp_block_spec

    config = decoder_config(architecture, dtype, **changes)
    backend = get_backend(config.transformer_impl)
    return MultimodalGPTModel(
        config=config,
        transformer_layer_spec=decoder_block_spec(config, backend),
        mtp_block_spec=mtp_block_spec(config, backend),
        vocab_size=architecture.vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="mrope",
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
        scatter_embedding_sequence_parallel=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def perturb(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter values from the seed that no two layouts or formulas share by accident.

    Fresh norms are all alike, and a fresh GatedDeltaNet forgets within a few tokens: here it remembers dozens.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.5 / parameter.size(-1) ** 0.5 if parameter.dim() > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("A_log"):
                parameter.fill_(-3.0)
            elif parameter.dim() > 1:
                parameter.zero_()  # its random initial values don't come from the seed
            parameter.add_((noise * scale).to(parameter))


def document_inputs(lengths: list[int], vocab_size: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random documents: input_ids, labels, loss_mask [1, L] and position_ids [3, 1, L] that differ between axes."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        tokens = torch.randint(0, vocab_size, (1, length + 1), generator=generator)
        steps = torch.randint(0, 3, (3, 1, length), generator=generator)
        trained = torch.rand(1, length, generator=generator) < 0.6
        trained[:, 0] = False  # no answer starts a document
        trained[:, -1] = False  # nothing follows a document's last token
        documents.append(
            {
                "input_ids": tokens[:, :-1],
                "labels": tokens[:, 1:],
                "loss_mask": trained.float(),
                "position_ids": steps.cumsum(-1),
            }
        )
    return documents


def pack(documents: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The documents as one THD row, with its `packed_seq_params`."""
    from megatron.core.packed_seq_params import PackedSeqParams

    lengths = [document["input_ids"].size(1) for document in documents]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = {name: torch.cat([document[name] for document in documents], dim=-1) for name in documents[0]}
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        cu_seqlens_q_padded=borders,
        cu_seqlens_kv_padded=borders,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    return {**packed, "packed_seq_params": params}
