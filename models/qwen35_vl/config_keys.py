"""Keys of a Qwen3.5-VL `config.json` that the configuration has no number for: what they must say, or why not read.

transformers' classes compute with some of them in ways that aren't built here. A folder that uses one would be trained
as another model than it is, so it is refused by the key's name. Every field of the configuration classes of
transformers 5.17 is read by `configuration.Qwen35VLConfig.from_hf` or stands here; a test walks the classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Section -> key -> the values that are built, None where an absent value is written as null.
FIXED: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "text_config": {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "attn_output_gate": (True,),
        "mlp_only_layers": ([], None),
        "mtp_use_dedicated_embeddings": (False,),
    },
    "text_config.rope_parameters": {
        "rope_type": ("default",),
        "type": ("default",),  # the older spelling
        "mrope_interleaved": (True,),
    },
    "vision_config": {
        # Releases repeat the top one, transformers writes its own.
        "model_type": ("qwen3_5", "qwen3_5_vision", "qwen3_5_moe", "qwen3_5_moe_vision"),
        "hidden_act": ("gelu_pytorch_tanh",),
        "deepstack_visual_indexes": ([], None),
    },
    "vision_config.rope_parameters": {
        "rope_type": ("axial", "default"),
        "rope_theta": (10000.0,),
    },
}
_OF_EVERY_CLASS = {
    "architectures": "model_type says it",
    "transformers_version": "a remark",
    "_name_or_path": "a remark",
    "dtype": "the tensors have their own, and the run its precision",
    "torch_dtype": "the older spelling of dtype",
    "output_hidden_states": "what a call returns",
    "output_attentions": "what a call returns",
    "return_dict": "what a call returns",
    "chunk_size_feed_forward": "no Qwen3.5 class uses it",
    "is_encoder_decoder": "no Qwen3.5 class uses it",
    "id2label": "of classification heads",
    "label2id": "of classification heads",
    "problem_type": "of classification heads",
}
# Section -> key -> why its value makes no difference here.
UNREAD: Mapping[str, Mapping[str, str]] = {
    "": _OF_EVERY_CLASS,
    "text_config": {
        **_OF_EVERY_CLASS,
        "model_type": "the top one says it",
        "tie_word_embeddings": "the top one is the true one",
        "use_cache": "of generation",
        "bos_token_id": "of generation",
        "pad_token_id": "only keeps the padding's embedding from being trained, which no loss reaches",
        "mamba_ssm_dtype": "of servers' caches; the memory is float32 here too",
        "output_router_logits": "a run's loss is its flags': --moe-aux-loss-coeff",
        "router_aux_loss_coef": "a run's loss is its flags': --moe-aux-loss-coeff",
    },
    "vision_config": {**_OF_EVERY_CLASS, "initializer_range": "the decoder's is used"},
}


def unbuilt_keys(config: Mapping[str, Any]) -> list[str]:
    """Keys whose value changes what transformers computes and isn't built here, each with its value.

    Args:
        config: with the objects `text_config` and `vision_config`.
    """
    text, vision = config["text_config"], config["vision_config"]
    rope_key = next((key for key in ("rope_parameters", "rope_scaling") if text.get(key)), "rope_parameters")
    sections = {
        "text_config": ("text_config", text),
        "text_config.rope_parameters": (f"text_config.{rope_key}", text.get(rope_key)),
        "vision_config": ("vision_config", vision),
        "vision_config.rope_parameters": ("vision_config.rope_parameters", vision.get("rope_parameters")),
    }
    found = []
    for name, keys in FIXED.items():
        spelled, section = sections[name]
        if not isinstance(section, Mapping):
            continue
        for key, allowed in keys.items():
            if key in section and section[key] not in allowed:
                built = " or ".join(map(repr, allowed))
                found.append(f"{spelled}.{key} is {section[key]!r}, which isn't built here; only {built} is")
    return found
