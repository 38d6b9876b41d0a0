"""Build one pipeline stage of Qwen3.5-VL: ViT in front, hybrid decoder behind; or of its text class, without a ViT."""

from __future__ import annotations

from argparse import Namespace

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from models.backends import get_backend
from models.base import MultimodalModel
from models.common.gpt import MultimodalGPTModel
from models.common.output_layer import fuse_weight_gradients
from models.qwen35_vl.configuration import Qwen35VLConfig
from models.qwen35_vl.specs import decoder_block_spec, mtp_block_spec
from models.qwen35_vl.vision_encoder import VisionEncoder, vision_transformer_config


def build_qwen35_vl(
    args: Namespace,
    architecture: Qwen35VLConfig,
    language_config: TransformerConfig,
    *,
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
    pg_collection: ProcessGroupCollection,
) -> MultimodalModel:
    """Build the stage that this rank owns; see `models.spec.BuildModel`."""
    # megatron-core's argument check forbids MTP with mrope, so the command line says rope.
    language_config.position_embedding_type = "mrope"
    language_config.mrope_section = list(architecture.mrope_section)
    backend = get_backend(
        language_config.transformer_impl,
        adapters=args.lora_rank is not None,
        # Its checkpoints know experts one by one (megatron-core's fsdp_dtensor_checkpoint.py, by their names).
        stack_experts=not args.use_megatron_fsdp,
    )
    language_model = MultimodalGPTModel(
        config=language_config,
        transformer_layer_spec=decoder_block_spec(language_config, backend, vp_stage=vp_stage),
        mtp_block_spec=mtp_block_spec(language_config, backend, vp_stage=vp_stage),
        vocab_size=architecture.vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="mrope",
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
        scatter_embedding_sequence_parallel=False,  # after the vision features are in: MultimodalModel
        pg_collection=pg_collection,
        vp_stage=vp_stage,
        keep_logits=args.keep_logits,
    )
    vision_model = None
    if pre_process and not architecture.language_model_only:
        vision_model = VisionEncoder(
            _vision_config(args, architecture, language_config),
            architecture.vision,
            backend,
            out_hidden_size=language_config.hidden_size,
            pg_collection=pg_collection,
        )
    model = MultimodalModel(
        language_config, language_model=language_model, vision_model=vision_model, pg_collection=pg_collection
    )
    if args.fuse_weight_gradients:
        fuse_weight_gradients(model)
    return model


def _vision_config(
    args: Namespace, architecture: Qwen35VLConfig, language_config: TransformerConfig
) -> TransformerConfig:
    config = vision_transformer_config(language_config, architecture.vision)
    if args.recompute_vision:
        config.recompute_granularity = "full"
        config.recompute_method = "uniform"
        config.recompute_num_layers = 1
    return config
