"""Multi-token prediction against a plain forward pass written here: loss and every gradient, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.build_decoder import build_decoder, document_inputs, pack, perturb
from tests.errors import relative_error

pytestmark = pytest.mark.usefixtures("single_rank")

TINY = VARIANTS["tiny"]
TOLERANCE = 1e-9  # measured: 1e-15 on losses, 2e-14 on the worst gradient
LENGTHS = [12, 1, 2, 30, 3]
SCALE = 0.1  # megatron-core's default mtp_loss_scaling_factor


@pytest.fixture(autouse=True)
def clean_log() -> Iterator[None]:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    yield
    MTPLossLoggingHelper.tracker.clear()


def make_decoder(**changes: object) -> nn.Module:
    with float64():
        model = build_decoder(TINY, **changes).double()
    perturb(model)
    return model


def make_documents(lengths: list[int]) -> list[dict[str, Tensor]]:
    """Training some documents' first token: only then do the depths count different numbers of tokens."""
    documents = document_inputs(lengths, TINY.vocab_size)
    for document in documents[::2]:
        document["loss_mask"][:, 0] = 1.0
    return documents


# The plain reference, one document at a time


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """The first quarter of each head of [L, heads, D]; positions [3, L]; axes by channel T H W T (sections 2 1 1)."""
    channels = int(TINY.kv_channels * TINY.rotary_percent) // 2
    inv_freq = 1.0 / TINY.rotary_base ** (torch.arange(channels) / channels)
    angle = (positions.double()[[0, 1, 2, 0]].T * inv_freq)[:, None, :]
    first, second, rest = x.split((channels, channels, x.size(-1) - 2 * channels), dim=-1)
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat((*turned, rest), dim=-1)


def attention(x: Tensor, weights: nn.Module, positions: Tensor) -> Tensor:
    """Gated causal attention over one document's [L, H]."""
    length, groups, width = len(x), TINY.num_query_groups, TINY.kv_channels
    per_group = TINY.num_attention_heads // groups
    grouped = (x @ weights.linear_qkv.weight.T).view(length, groups, -1, width)
    query, gate, key, value = grouped.split((per_group, per_group, 1, 1), dim=2)
    query = rotate(rms_norm(query, weights.q_layernorm.weight).flatten(1, 2), positions)
    key = rotate(rms_norm(key, weights.k_layernorm.weight).flatten(1, 2), positions)
    key, value = (y.repeat_interleave(per_group, dim=1) for y in (key, value.flatten(1, 2)))
    scores = torch.einsum("qhd,khd->hqk", query, key) / width**0.5
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    return (mixed * gate.flatten(1, 2).sigmoid()).flatten(1) @ weights.linear_proj.weight.T


def mtp_layer(weights: nn.Module, hidden: Tensor, embedded: Tensor, positions: Tensor) -> Tensor:
    """[L, H] hidden states and the next tokens' embeddings -> [L, H]."""
    both = torch.cat((rms_norm(embedded, weights.enorm.weight), rms_norm(hidden, weights.hnorm.weight)), dim=-1)
    x = both @ weights.eh_proj.weight.T
    layer = weights.mtp_model_layer
    x = x + attention(rms_norm(x, layer.input_layernorm.weight), layer.self_attention, positions)
    gate, up = (rms_norm(x, layer.pre_mlp_layernorm.weight) @ layer.mlp.linear_fc1.weight.T).chunk(2, dim=-1)
    x = x + (F.silu(gate) * up) @ layer.mlp.linear_fc2.weight.T
    return rms_norm(x, weights.final_layernorm.weight)


def shifted(x: Tensor) -> Tensor:
    return torch.cat((x[1:], x.new_zeros(1)))


def reference(model: nn.Module, documents: list[dict[str, Tensor]], depths: int) -> tuple[Tensor, list[Tensor]]:
    """The sum that training differentiates, and each depth's mean loss; GatedDeltaNet layers are the model's own."""
    words = model.embedding.word_embeddings.weight
    main, trained = words.new_zeros(()), words.new_zeros(())
    sums, counts = [list(words.new_zeros(depths)) for _ in range(2)]
    for document in documents:
        ids, labels, mask = (document[name][0] for name in ("input_ids", "labels", "loss_mask"))
        positions = document["position_ids"][:, 0]
        angles = model.rotary_pos_emb(document["position_ids"], TINY.mrope_section)
        hidden = model.decoder(words[ids][:, None], attention_mask=None, rotary_pos_emb=angles).squeeze(1)
        main = main + (F.cross_entropy(hidden @ words.T, labels, reduction="none") * mask).sum()
        trained = trained + mask.sum()
        for depth in range(depths):
            ids, labels, mask = shifted(ids), shifted(labels), shifted(mask)
            hidden = mtp_layer(model.mtp.layers[depth], hidden, words[ids], positions)
            losses = F.cross_entropy(hidden @ words.T, labels, reduction="none")
            sums[depth] = sums[depth] + (losses * mask).sum()
            counts[depth] = counts[depth] + mask.sum()
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    return main + SCALE / depths * sum(mean * trained for mean in means), means


@pytest.mark.parametrize("depths", [1, 2])
def test_loss_and_gradients(depths: int) -> None:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    model = make_decoder(mtp_num_layers=depths)
    documents = make_documents(LENGTHS)
    inputs = pack(documents)
    with float64():
        losses = model(attention_mask=None, **inputs)
        (losses * inputs["loss_mask"]).sum().backward()
        actual = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        total, means = reference(model, documents, depths)
        total.backward()
    logged = MTPLossLoggingHelper.tracker["loss_values"]
    assert relative_error(logged, torch.stack(means).detach()) < TOLERANCE
    errors = {name: relative_error(actual[name], p.grad) for name, p in model.named_parameters()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("depths", [1, 2])
def test_losses_of_trained_rows_alone_train_the_same(depths: int) -> None:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    model = make_decoder(mtp_num_layers=depths)
    inputs = pack(make_documents(LENGTHS))
    trained = [inputs["loss_mask"].bool()]
    borders = inputs["packed_seq_params"].cu_seqlens_q.tolist()
    for _ in range(depths):
        trained.append(torch.cat([F.pad(trained[-1][:, a + 1 : b], (0, 1)) for a, b in pairwise(borders)], dim=1))
    rows = [mask.flatten().nonzero().flatten() for mask in trained]
    rows = torch.stack([F.pad(row, (0, 60 - len(row)), value=-1) for row in rows])
    runs = []
    with float64():
        for trained_rows in (None, rows):
            MTPLossLoggingHelper.tracker.clear()
            model.zero_grad()
            losses = model(attention_mask=None, output_processor_context=trained_rows, **inputs)
            (losses * inputs["loss_mask"]).sum().backward()
            logged = {k: v.clone() for k, v in MTPLossLoggingHelper.tracker.items() if isinstance(v, Tensor)}
            runs.append((losses.detach(), logged, {name: p.grad for name, p in model.named_parameters()}))
    (every, every_logged, expected), (alone, alone_logged, actual) = runs
    assert relative_error(alone, every * trained[0]) < TOLERANCE
    errors = {name: relative_error(actual[name], gradient) for name, gradient in expected.items()}
    assert max(errors.values()) < TOLERANCE, errors
    assert len(every_logged) >= 3  # losses, hits and how many there could be
    assert max(relative_error(alone_logged[name], value) for name, value in every_logged.items()) < TOLERANCE


def test_gradients_reach_every_parameter_of_a_sparse_layer() -> None:
    with float64():
        model = build_decoder(VARIANTS["tiny_moe"]).double()
        perturb(model)
        inputs = pack(make_documents(LENGTHS))
        (model(attention_mask=None, **inputs) * inputs["loss_mask"]).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.norm() > 0 for p in model.mtp.parameters())


def test_recomputation_changes_no_gradient() -> None:
    inputs = pack(make_documents(LENGTHS))
    gradients = []
    for changes in (
        {},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ):
        model = make_decoder(**changes)
        with float64():
            (model(attention_mask=None, **inputs) * inputs["loss_mask"]).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    errors = {name: relative_error(gradients[1][name], gradient) for name, gradient in gradients[0].items()}
    assert max(errors.values()) < TOLERANCE, errors


def test_evaluation_runs_no_mtp() -> None:
    model = make_decoder()
    inputs = pack(make_documents(LENGTHS))
    with float64(), torch.no_grad():
        trained = model(attention_mask=None, **inputs)
        model.mtp = None
        evaluated = model.eval()(attention_mask=None, **inputs)
    assert torch.equal(trained, evaluated)


def test_mtp_needs_a_loss_per_token() -> None:
    with pytest.raises(ValueError, match="--calculate-per-token-loss"):
        build_decoder(TINY, calculate_per_token_loss=False)


# Moving to the next token


def test_shift_stops_at_documents() -> None:
    from megatron.core.parallel_state import get_context_parallel_group

    from models.common.mtp import shift_left

    group = get_context_parallel_group()
    ids = torch.arange(10, 18)[None]
    padding = torch.tensor([[0, 0, 1, 0, 0, 0, 1, 1]]).bool()
    params = pack([{"input_ids": ids[:, :3]}, {"input_ids": ids[:, 3:4]}, {"input_ids": ids[:, 4:]}])
    moved = shift_left([ids, padding], [0, True], params["packed_seq_params"], group)
    assert moved[0].tolist() == [[11, 12, 0, 0, 15, 16, 17, 0]]
    assert moved[0].dtype == torch.int64
    # A document's last real token has no next one, whether padding follows it or not.
    assert moved[1].int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1]]
    rows = shift_left([ids.view(2, 4)], [-1.0], None, group)[0]
    assert rows.tolist() == [[11, 12, 13, -1], [15, 16, 17, -1]]
