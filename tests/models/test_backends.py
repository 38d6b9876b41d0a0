"""What the torch backend is made of, against plain formulas in float64; and both backends build the same decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.qwen35_vl.configuration import VARIANTS
from tests.build_decoder import build_decoder, decoder_config
from tests.errors import relative_error

pytestmark = pytest.mark.usefixtures("single_rank")

TOLERANCE = 1e-12  # measured: 1e-15
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
# Rows of one document each would hold 4 * 50^2 places against 67^2 of one mask for all; and the other way round.
PACKS = {"rows": [20, 1, 30, 16], "one_mask": [3, 50, 2, 12]}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_gradients(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    weights = normal(*expected.shape, seed=9)
    assert relative_error(actual, expected) < TOLERANCE
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (actual, expected)]
    for actual_gradient, expected_gradient in zip(*gradients, strict=True):
        assert relative_error(actual_gradient, expected_gradient) < TOLERANCE


# Norms


def norm_config(**changes: object):
    return decoder_config(VARIANTS["tiny"], torch.float64, **changes)


@pytest.mark.parametrize("zero_centred", [True, False])
def test_rms_norm(zero_centred: bool) -> None:
    from models.backends import get_backend

    config = norm_config(layernorm_zero_centered_gamma=zero_centred)
    norm = get_backend("local").layer_norm()(config=config, hidden_size=24, eps=1e-6)
    x = normal(5, 24).requires_grad_()
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), unit)  # as it starts
    norm.weight.data.copy_(normal(24, seed=1))
    expected = unit * (norm.weight + (1.0 if zero_centred else 0.0))
    assert_same_gradients(norm(x), expected, [x, norm.weight])


def test_layer_norm() -> None:
    from models.backends import get_backend

    config = norm_config(normalization="LayerNorm", layernorm_zero_centered_gamma=False)
    norm = get_backend("local").layer_norm()(config=config, hidden_size=24, eps=1e-6)
    norm.weight.data.copy_(normal(24, seed=1))
    norm.bias.data.copy_(normal(24, seed=2))
    x = normal(5, 24).requires_grad_()
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias
    assert_same_gradients(norm(x), expected, [x, norm.weight, norm.bias])


def test_plain_norm_ignores_the_configuration() -> None:
    from models.backends import get_backend

    norm = get_backend("local").plain_rms_norm()(config=norm_config(), hidden_size=24, eps=1e-6)
    assert torch.equal(norm.weight, torch.ones(24, dtype=torch.float64))
    x = normal(5, 24)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_norm_weights_say_that_their_gradient_is_a_share() -> None:
    from models.backends import get_backend

    config = norm_config(normalization="LayerNorm")
    config.sequence_parallel = True  # by assignment: the constructor wants TP > 1 for it
    for builder in (get_backend("local").layer_norm(), get_backend("local").plain_rms_norm()):
        norm = builder(config=config, hidden_size=24, eps=1e-6)
        assert all(parameter.sequence_parallel for parameter in norm.parameters())


def test_bfloat16_norm_computes_in_float32() -> None:
    from models.backends import get_backend

    config = decoder_config(VARIANTS["tiny"], torch.bfloat16)
    norm = get_backend("local").layer_norm()(config=config, hidden_size=24, eps=1e-6)
    x = normal(5, 24).bfloat16()
    expected = torch.nn.functional.rms_norm(x.float(), (24,), eps=1e-6).bfloat16()
    assert torch.equal(norm(x), expected)


# Attention


def attention(*, causal: bool):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from models.backends import get_backend

    return get_backend("local").core_attention()(
        config=decoder_config(VARIANTS["tiny"], torch.float64),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal if causal else AttnMaskType.no_mask,
        attention_type="self",
        softmax_scale=0.3,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]),
    )


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """One document: [L, heads, D] -> [L, heads * D]."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).flatten(1)


def qkv(*shape: int) -> list[Tensor]:
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [normal(*shape, count, HEAD_DIM, seed=i).requires_grad_() for i, count in enumerate(heads)]


def packed_params(lengths: list[int]):
    from megatron.core.packed_seq_params import PackedSeqParams

    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_rows(causal: bool) -> None:
    inputs = qkv(21, 3)
    expected = [softmax_attention(*(x[:, row] for x in inputs), causal=causal) for row in range(3)]
    actual = attention(causal=causal)(*inputs, None)
    assert_same_gradients(actual, torch.stack(expected, dim=1), inputs)


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_over_documents(causal: bool, lengths: list[int]) -> None:
    inputs = qkv(sum(lengths))
    documents = zip(*(x.split(lengths) for x in inputs), strict=True)
    expected = torch.cat([softmax_attention(*document, causal=causal) for document in documents])
    actual = attention(causal=causal)(*inputs, None, packed_seq_params=packed_params(lengths))
    assert_same_gradients(actual, expected, inputs)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_waits_for_no_device(causal: bool) -> None:
    """Meta tensors have no values: reading one on the host raises."""
    module = attention(causal=causal)
    for lengths in PACKS.values():
        params = packed_params(lengths)
        params.cu_seqlens_q = params.cu_seqlens_q.to("meta")
        inputs = [x.detach().to("meta") for x in qkv(sum(lengths))]
        assert module(*inputs, None, packed_seq_params=params).shape == (sum(lengths), HEADS * HEAD_DIM)


def test_attention_refuses_what_it_would_ignore() -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from models.backends import get_backend

    with pytest.raises(ValueError, match="no attention mask"):
        attention(causal=True)(*qkv(4, 1), torch.ones(4, 4, dtype=torch.bool))
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    with pytest.raises(ValueError, match=r"--attention-dropout 0\.1"):
        get_backend("local").core_attention()(
            config=norm_config(attention_dropout=0.1),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            pg_collection=groups,
        )


# Choice


def test_unknown_backend_is_refused() -> None:
    from models.backends import get_backend

    with pytest.raises(ValueError, match="--transformer-impl inference_optimized: choose local or transformer_engine"):
        get_backend("inference_optimized")


@pytest.mark.parametrize("variant", ["tiny", "tiny_moe"])
def test_transformer_engine_assembles_the_same_decoder(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameter by parameter on the meta device; Transformer Engine only fuses norms into the linears behind them."""
    pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine isn't installed")
    from runtime.meta import meta_device

    # Transformer Engine refuses to build anything, meta tensors included, where no CUDA device is.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with meta_device():
        decoders = {
            backend: build_decoder(VARIANTS[variant], torch.bfloat16, transformer_impl=backend, moe_grouped_gemm=True)
            for backend in ("local", "transformer_engine")
        }
    shapes = {
        backend: {name: (tuple(p.shape), p.dtype) for name, p in decoder.named_parameters()}
        for backend, decoder in decoders.items()
    }
    assert {fused_name(name, variant): shape for name, shape in shapes["local"].items()} == shapes["transformer_engine"]
    layers = decoders["transformer_engine"].decoder.layers
    assert not layers[0].self_attention.out_norm.zero_centered_gamma
    assert layers[3].self_attention.q_layernorm.zero_centered_gamma


def fused_name(name: str, variant: str) -> str:
    """Transformer Engine's name of a parameter of the torch backend."""
    layer = name.partition(".input_layernorm.")[0]
    full_attention = layer == "decoder.layers.3" or layer.startswith("mtp.")
    name = name.replace(
        ".input_layernorm.", f".self_attention.{'linear_qkv' if full_attention else 'in_proj'}.layer_norm_"
    )
    if variant == "tiny":
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    return name
