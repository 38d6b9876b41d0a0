"""Models on the meta device."""

from __future__ import annotations

import resource

import torch
from torch import nn

from runtime.meta import build_on_meta, meta_device


def test_what_has_no_values_is_meta() -> None:
    with meta_device():
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        made = [
            torch.empty(2, device=device),
            torch.empty(2, dtype=torch.float64).to(torch.bfloat16),
            torch.empty(2).cuda(),
            torch.empty(2).cpu(),
            torch.empty(2).to(device),
            torch.empty(2).to(device=device),
            nn.Linear(2, 2, device=device).weight,
        ]
    assert all(tensor.is_meta for tensor in made)
    assert made[1].dtype == torch.bfloat16


def test_what_has_values_keeps_them() -> None:
    """Under torch.device("meta") too, which Megatron puts around the construction of a model."""
    with torch.device("meta"), meta_device():
        made = [torch.tensor([1.0]), torch.ones(1), torch.arange(1, 2), torch.full((1,), 1.0, device="cpu").to("cpu")]
    assert [tensor.item() for tensor in made] == [1, 1, 1, 1]


def test_buffers_are_on_the_current_device() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2))
            self.register_buffer("counts", torch.zeros(2), persistent=False)

    layer = build_on_meta(Layer)
    assert layer.weight.is_meta and layer.counts.tolist() == [0, 0]
    assert "counts" not in layer.state_dict()


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
