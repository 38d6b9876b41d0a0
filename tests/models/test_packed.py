"""Documents packed in one THD row against each of them alone: loss, logits and summed gradients, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from models.common.gdn_kernels import TORCH_KERNELS, causal_conv, gated_delta_rule
from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.build_decoder import build_decoder, document_inputs, pack, perturb
from tests.errors import relative_error

pytestmark = pytest.mark.usefixtures("single_rank")

TOLERANCE = 1e-9  # measured: 4e-15 on losses and logits, 2e-14 on the worst gradient
# One token, shorter than the convolution, several chunks of the gated delta rule.
LENGTHS = [9, 1, 3, 40, 2, 100, 31]


@pytest.fixture(scope="module", params=["tiny", "tiny_moe"])
def decoder(request: pytest.FixtureRequest) -> nn.Module:
    with float64():
        model = build_decoder(VARIANTS[request.param]).double()
    perturb(model)
    return model


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses and logits [1, S, ...]; gradients of the trained tokens' sum, MTP's share included, are added up."""
    losses = model(attention_mask=None, **inputs)
    (losses * inputs["loss_mask"]).sum().backward()
    with torch.no_grad():
        logits = model(attention_mask=None, **{**inputs, "labels": None})
    return losses.detach(), logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    taken = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return taken


def test_packed_equals_alone(decoder: nn.Module) -> None:
    documents = document_inputs(LENGTHS, vocab_size=1024)
    with float64():
        alone = [run(decoder, document) for document in documents]
        alone_gradients = gradients(decoder)
        losses, logits = run(decoder, pack(documents))
        packed_gradients = gradients(decoder)
    for packed, expected in ((losses, 0), (logits, 1)):
        for part, result in zip(packed.split(LENGTHS, dim=1), alone, strict=True):
            assert relative_error(part, result[expected]) < TOLERANCE
    assert all(gradient.norm() > 0 for gradient in alone_gradients.values())
    errors = {name: relative_error(packed_gradients[name], x) for name, x in alone_gradients.items()}
    assert max(errors.values()) < TOLERANCE, errors


def test_padding_after_a_document_changes_nothing(decoder: nn.Module) -> None:
    """Documents are padded to what CP and sequence parallelism divide; padding reaches no real token."""
    documents = document_inputs([10, 25], vocab_size=1024)
    padded = [{name: nn.functional.pad(value, (0, 6)) for name, value in document.items()} for document in documents]
    with float64():
        losses, logits = run(decoder, pack(documents))
        expected = gradients(decoder)
        padded_losses, padded_logits = run(decoder, pack(padded))
        actual = gradients(decoder)
    for result, padded_result in ((losses, padded_losses), (logits, padded_logits)):
        for part, padded_part in zip(result.split([10, 25], 1), padded_result.split([16, 31], 1), strict=True):
            assert relative_error(padded_part[:, : part.size(1)], part) < TOLERANCE
    errors = {name: relative_error(actual[name], x) for name, x in expected.items()}
    assert max(errors.values()) < TOLERANCE, errors


def test_rows_equal_alone(decoder: nn.Module) -> None:
    documents = document_inputs([40, 40, 40], vocab_size=1024)
    rows = {
        name: torch.cat([document[name] for document in documents], dim=1 if name == "position_ids" else 0)
        for name in documents[0]
    }
    with float64():
        alone = [run(decoder, document) for document in documents]
        alone_gradients = gradients(decoder)
        losses, logits = run(decoder, rows)
        row_gradients = gradients(decoder)
    assert relative_error(losses, torch.cat([result[0] for result in alone])) < TOLERANCE
    assert relative_error(logits, torch.cat([result[1] for result in alone])) < TOLERANCE
    errors = {name: relative_error(row_gradients[name], x) for name, x in alone_gradients.items()}
    assert max(errors.values()) < TOLERANCE, errors


LEAKS = {
    "convolution": replace(TORCH_KERNELS, causal_conv=lambda x, weight, *_: causal_conv(x, weight, None)),
    "memory": replace(TORCH_KERNELS, gated_delta_rule=lambda *inputs: gated_delta_rule(*inputs[:-2], None)),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_between_documents_shows(decoder: nn.Module, leak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_packed_equals_alone fails with either kernel going on through document borders."""
    from models.common import gated_delta_net

    documents = document_inputs(LENGTHS, vocab_size=1024)
    with float64():
        expected, _ = run(decoder, pack(documents))
        monkeypatch.setattr(gated_delta_net, "kernels_for", lambda *_, **__: LEAKS[leak])
        actual, _ = run(decoder, pack(documents))
        gradients(decoder)
    first, *later = zip(actual.split(LENGTHS, 1), expected.split(LENGTHS, 1), strict=True)
    assert relative_error(*first) < TOLERANCE
    assert all(relative_error(*document) > 1e6 * TOLERANCE for document in later)


def test_attention_stays_inside_documents(decoder: nn.Module) -> None:
    """The same for attention: one document with the borders left out differs."""
    documents = document_inputs([20, 30], vocab_size=1024)
    packed = pack(documents)
    one = pack(documents)
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):
        setattr(one["packed_seq_params"], name, torch.tensor([0, 50], dtype=torch.int32))
    one["packed_seq_params"].max_seqlen_q = 50
    attention = decoder.decoder.layers[3].self_attention
    hidden = torch.randn(50, 1, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = [attention(hidden, None, packed_seq_params=inputs["packed_seq_params"])[0] for inputs in (packed, one)]
    assert relative_error(outputs[1][:20], outputs[0][:20]) < TOLERANCE
    assert relative_error(outputs[1][20:], outputs[0][20:]) > 1e-2


class EverythingOnMeta(TorchFunctionMode):
    """Every tensor is created and stays on the meta device, even where another is named."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors() or kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        if func in (Tensor.cuda, Tensor.cpu):
            return args[0].to("meta")
        if func is Tensor.to:
            args = tuple("meta" if isinstance(arg, torch.device | str | int) else arg for arg in args)
        return func(*args, **kwargs)


def test_nothing_waits_for_the_device() -> None:
    """Forward and backward, MTP's too, on meta tensors, which have no values: reading one on the host raises."""
    packed = pack(document_inputs(LENGTHS, vocab_size=1024))
    params = packed["packed_seq_params"]
    for name in ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded"):
        setattr(params, name, getattr(params, name).to("meta"))
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in packed.items()}
    with EverythingOnMeta():
        model = build_decoder(VARIANTS["tiny"])
        losses = model(attention_mask=None, **inputs)
        (losses * inputs["loss_mask"]).sum().backward()
    assert losses.shape == (1, sum(LENGTHS))
