"""GatedDeltaNet's torch kernels against token-by-token loops, forward and backward, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import gdn_kernels
from models.common.gdn_kernels import causal_conv, gated_delta_rule
from tests.errors import relative_error

TAPS = 4
# One token; shorter than the convolution; a chunk's length; over chunk borders; and again one token.
LENGTHS = [1, 3, 2, 32, 45, 70, 1]
TOLERANCE = 1e-12  # measured: 4e-15


def borders(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def slow_conv(x: Tensor, weight: Tensor, cu_seqlens: Tensor) -> Tensor:
    output = torch.empty_like(x)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for token in range(start, end):
            taps = range(min(TAPS, token - start + 1))
            output[:, token] = sum(x[:, token - back] * weight[:, TAPS - 1 - back] for back in taps)
    return F.silu(output)


def slow_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor) -> Tensor:
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    outputs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        memory = q.new_zeros(q.size(0), q.size(2), q.size(3), v.size(3))
        for token in range(start, end):
            memory = memory * g[:, token, :, None, None].exp()
            recalled = torch.einsum("bhkv,bhk->bhv", memory, k[:, token])
            new = beta[:, token, :, None] * (v[:, token] - recalled)
            memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, token], new)
            outputs.append(torch.einsum("bhkv,bhk->bhv", memory, q[:, token]) / q.size(-1) ** 0.5)
    return torch.stack(outputs, dim=1)


def conv_inputs(rows: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, length, 10, generator=generator, dtype=torch.float64)
    weight = torch.randn(10, TAPS, generator=generator, dtype=torch.float64)
    return [x.requires_grad_(), weight.requires_grad_()]


def rule_inputs(rows: int, length: int) -> list[Tensor]:
    """Two heads with keys of 8 and values of 6; decays from nearly none to nearly all."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, length, 2, *shape, generator=generator, dtype=torch.float64)

    inputs = [normal(8), normal(8), normal(6), -F.softplus(2 * normal()), normal().sigmoid()]
    return [x.requires_grad_() for x in inputs]


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert relative_error(actual, expected) < TOLERANCE
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (actual, expected)]
    for actual_gradient, expected_gradient in zip(*gradients, strict=True):
        assert relative_error(actual_gradient, expected_gradient) < TOLERANCE


def test_convolution_restarts_at_documents() -> None:
    inputs, cu_seqlens = conv_inputs(1, sum(LENGTHS)), borders(LENGTHS)
    assert_same(causal_conv(*inputs, cu_seqlens), slow_conv(*inputs, cu_seqlens), inputs)


@pytest.mark.parametrize("length", [2, 37])
def test_convolution_of_rows(length: int) -> None:
    inputs = conv_inputs(2, length)
    assert_same(causal_conv(*inputs, None), slow_conv(*inputs, borders([length])), inputs)


@pytest.mark.parametrize("chunk_size", [4, 32, 256])
def test_rule_restarts_at_documents(chunk_size: int) -> None:
    inputs, cu_seqlens = rule_inputs(1, sum(LENGTHS)), borders(LENGTHS)
    assert_same(gated_delta_rule(*inputs, cu_seqlens, chunk_size), slow_rule(*inputs, cu_seqlens), inputs)


@pytest.mark.parametrize("length", [1, 64, 75])
def test_rule_of_rows(length: int) -> None:
    inputs = rule_inputs(2, length)
    assert_same(gated_delta_rule(*inputs, None), slow_rule(*inputs, borders([length])), inputs)


@pytest.mark.parametrize("kernel", ["conv", "rule"])
def test_a_leak_between_documents_shows(kernel: str) -> None:
    """The comparisons above would notice a kernel that goes on through document borders."""
    inputs = conv_inputs(1, 60) if kernel == "conv" else rule_inputs(1, 60)
    run, slow = (causal_conv, slow_conv) if kernel == "conv" else (gated_delta_rule, slow_rule)
    expected = slow(*inputs, borders([25, 35]))
    leaked = run(*inputs, None)
    assert relative_error(leaked[:, :25], expected[:, :25]) < TOLERANCE
    assert relative_error(leaked[:, 25:], expected[:, 25:]) > 1e-2


def test_full_decay_is_finite() -> None:
    """exp(-60) per token: a chunk's total decay isn't representable, and nothing may turn into inf or NaN."""
    q, k, v, _, beta = (x.detach().float().requires_grad_() for x in rule_inputs(1, 96))
    g = torch.full((1, 96, 2), -60.0, requires_grad=True)
    output = gated_delta_rule(q, k, v, g, beta, borders([50, 46]))
    output.sum().backward()
    assert all(x.isfinite().all() for x in (output, q.grad, k.grad, v.grad, g.grad, beta.grad))
    # Each token then remembers itself alone.
    unit_q, unit_k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    alone = (unit_q * unit_k).sum(-1, keepdim=True) * beta.unsqueeze(-1) * v / 8**0.5
    torch.testing.assert_close(output, alone, rtol=1e-5, atol=1e-6)


def test_bfloat16_costs_only_its_rounding() -> None:
    inputs, cu_seqlens = [x.detach().bfloat16() for x in rule_inputs(1, sum(LENGTHS))], borders(LENGTHS)
    actual = gated_delta_rule(*inputs, cu_seqlens)
    assert actual.dtype == torch.bfloat16
    expected = slow_rule(*(x.double() for x in inputs), cu_seqlens)
    assert relative_error(actual, expected) < 4e-3  # measured: 1.6e-3, the rounding of the output


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors have no values: reading one on the host raises."""
    conv, rule = ([x.detach().to("meta") for x in make(1, 70)] for make in (conv_inputs, rule_inputs))
    cu_seqlens = borders([30, 40]).to("meta")
    assert causal_conv(*conv, cu_seqlens).shape == conv[0].shape
    assert gated_delta_rule(*rule, cu_seqlens).shape == rule[2].shape


CHECK_SIZES = gdn_kernels.GDNSizes(heads=4, key_dim=32, value_dim=64, channels=96)


def test_kernel_check_names_a_wrong_gradient() -> None:
    def wrong_rule(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor | None, chunks: Tensor | None
    ) -> Tensor:
        return gated_delta_rule(q, k, v, 2 * g - g.detach(), beta, cu_seqlens)

    device = torch.device("cpu")
    right = gdn_kernels.kernel_errors(gdn_kernels.TORCH_KERNELS, CHECK_SIZES, device)
    assert max(right.values()) < gdn_kernels.FLA_TOLERANCE
    wrong = gdn_kernels.kernel_errors(
        replace(gdn_kernels.TORCH_KERNELS, gated_delta_rule=wrong_rule), CHECK_SIZES, device
    )
    assert {name for name, error in wrong.items() if error > gdn_kernels.FLA_TOLERANCE} == {"gradient of g"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_linear_attention_on_this_gpu() -> None:
    pytest.importorskip("fla", reason="flash-linear-attention isn't installed")
    gdn_kernels.check_fla_gradients(gdn_kernels.GDNSizes(heads=4, key_dim=128, value_dim=128, channels=512))
