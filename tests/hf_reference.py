"""transformers' Qwen3.5-VL as the reference of the parity tests.

The GPU's kernels are hidden while the modeling files are imported, whatever this machine has.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from evaluation.model import without_gpu_kernels
from models.qwen35_vl.configuration import Qwen35VLConfig

with without_gpu_kernels():
    from transformers import Qwen3_5Config, Qwen3_5MoeConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

TEXT, IMAGE, VIDEO = 0, 1, 2


def modeling(architecture: Qwen35VLConfig) -> ModuleType:
    """The modeling file of the dense or of the MoE family."""
    return modeling_qwen3_5_moe if architecture.is_moe else modeling_qwen3_5


def hf_config(
    architecture: Qwen35VLConfig,
) -> Qwen3_5Config | Qwen3_5MoeConfig | Qwen3_5TextConfig | Qwen3_5MoeTextConfig:
    """transformers' configuration object, with the attention and expert code that run in float64 too."""
    if architecture.language_model_only:
        config_class = Qwen3_5MoeTextConfig if architecture.is_moe else Qwen3_5TextConfig
    else:
        config_class = Qwen3_5MoeConfig if architecture.is_moe else Qwen3_5Config
    config = config_class(**architecture.to_hf())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def _model_class(architecture: Qwen35VLConfig) -> type[nn.Module]:
    family = "Qwen3_5Moe" if architecture.is_moe else "Qwen3_5"
    kind = "ForCausalLM" if architecture.language_model_only else "ForConditionalGeneration"
    return getattr(modeling(architecture), family + kind)


def build_hf(architecture: Qwen35VLConfig, seed: int = 0) -> nn.Module:
    """`Qwen3_5ForConditionalGeneration`, the text class or an MoE one, with weights that leave no parameter without
    effect."""
    torch.manual_seed(seed)
    model = _model_class(architecture)(hf_config(architecture))
    randomize(model)
    return model


def load_hf_folder(architecture: Qwen35VLConfig, folder: Path) -> nn.Module:
    """The same class from a folder, in the dtype that its tensors have."""
    return _model_class(architecture).from_pretrained(
        folder, dtype="auto", attn_implementation="eager", experts_implementation="eager"
    )


def build_hf_meta(architecture: Qwen35VLConfig) -> nn.Module:
    """The same class on the meta device: names and shapes of any size, no memory."""
    with torch.device("meta"):
        return _model_class(architecture)(hf_config(architecture))


def build_hf_vision(architecture: Qwen35VLConfig, seed: int = 0) -> nn.Module:
    """The ViT alone, with its merger."""
    torch.manual_seed(seed)
    model = modeling_qwen3_5.Qwen3_5VisionModel(hf_config(architecture).vision_config)
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Harsh random weights: HF's own initialisation (std 0.02, biases 0, norms 1) would hide most mistakes.

    Matrices keep the scale of their input, norms and biases move well away from their neutral value.
    """
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            weight.uniform_(-2.0, 1.5)
        elif name.endswith("norm.weight") and weight.dim() == 1 and "visual" not in name:
            weight.normal_(0.2, 0.4)
        elif weight.dim() == 1:
            weight.add_(torch.randn_like(weight), alpha=0.3)
        elif "embed" in name and weight.dim() == 2:
            weight.normal_(0.0, 1.0)
        else:
            fan_in = weight.shape[-1] if weight.dim() == 3 else weight[0].numel()
            weight.normal_(0.0, fan_in**-0.5)


def token_types(input_ids: Tensor, architecture: Qwen35VLConfig) -> Tensor:
    """`mm_token_type_ids` as the processor makes them: 0 text, 1 image, 2 video."""
    types = torch.zeros_like(input_ids)
    types[input_ids == architecture.token_ids.image] = IMAGE
    types[input_ids == architecture.token_ids.video] = VIDEO
    return types
