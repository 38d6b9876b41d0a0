"""Models on the meta device."""

from __future__ import annotations

import resource

import torch
from torch import nn

from runtime.meta import meta_device


def test_named_devices_give_way() -> None:
    with meta_device():
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        made = [
            torch.empty(2, device=device),
            torch.tensor([1.0], device=device),
            torch.empty(2),
            torch.ones(2, device=device, dtype=torch.float64).to(torch.bfloat16),
            torch.empty(2).cuda(),
            torch.empty(2).cpu(),
            torch.empty(2).to(device),
            torch.empty(2).to(device=device),
            nn.Linear(2, 2, device=device).weight,
        ]
    assert all(tensor.is_meta for tensor in made)
    assert made[3].dtype == torch.bfloat16


def test_outside_nothing_changes() -> None:
    with meta_device():
        torch.empty(1)
    assert torch.empty(1).device.type == "cpu"
    assert torch.ones(1).to("cpu").device.type == "cpu"


def test_gpt_model_takes_no_memory(single_rank: None) -> None:
    """10 billion parameters, 19 GiB in bf16, in layers that name their device."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=40,
        hidden_size=4096,
        num_attention_heads=32,
        ffn_hidden_size=14336,
        normalization="RMSNorm",
        add_bias_linear=False,
        params_dtype=torch.bfloat16,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with meta_device():
        model = GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), 248320, 32)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) > 9e9
    assert grown < 200 * 2**20


def test_parameters_made_on_the_current_device_are_meta(single_rank: None) -> None:
    """As GatedDeltaNet makes them: ssm/gated_delta_net/common.py:222."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            device = torch.cuda.current_device()
            self.conv = nn.Conv1d(4, 4, 2, device=device, dtype=torch.bfloat16)
            self.A_log = nn.Parameter(torch.empty(4, device=device))
            self.A_log.data.copy_(torch.empty(4, device=device).uniform_(1, 16).log())

    with meta_device():
        layer = Layer()
    assert all(parameter.is_meta for parameter in layer.parameters())
