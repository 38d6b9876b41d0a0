"""The output layer and its loss in one operation, against the plain product and torch's cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import linear_cross_entropy as operation
from models.common.linear_cross_entropy import IGNORED, linear_cross_entropy
from proofs.float64 import float64
from tests.errors import relative_error
from tests.ranks import run_on_ranks

ROWS, WIDTH, VOCABULARY = 37, 24, 1000
EXACT = 1e-14

type Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight chunks, the last one narrower."""
    use_small_chunks(monkeypatch.setattr, monkeypatch.setitem)


def use_small_chunks(set_attribute: Callable, set_item: Callable) -> None:
    set_attribute(operation, "SMALLEST_CHUNK", 128)
    set_item(operation.CHUNK_BYTES, "cpu", 1)


def make_inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, labels (some ignored) and the losses' gradients, in float64."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, WIDTH, generator=generator, dtype=torch.float64) for size in (ROWS, VOCABULARY))
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[[0, 5, ROWS - 1]] = IGNORED
    return hidden, weight, labels, torch.randn(ROWS, generator=generator, dtype=torch.float64)


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, ignore_index=IGNORED, reduction="none"
    )


def ours(keep_logits: bool = False) -> Losses:
    return lambda *inputs: linear_cross_entropy(*inputs, keep_logits=keep_logits)[0]


def results(losses_of: Losses, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Losses and gradients, computed in `dtype` from inputs that it can hold."""
    hidden, weight, labels, gradient = make_inputs(seed)
    # Rounded to bfloat16, which every dtype here but float16 holds; to a few bits fewer for that one.
    hidden, weight = (x.bfloat16().to(dtype).detach().requires_grad_() for x in (hidden, weight))
    losses = losses_of(hidden, weight, labels)
    losses.backward(gradient.to(losses.dtype))
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize("keep_logits", [False, True])
def test_float64_equals_the_plain_path(keep_logits: bool) -> None:
    expected = results(plain, torch.float64)
    actual = results(ours(keep_logits), torch.float64)
    errors = {name: relative_error(actual[name], x) for name, x in expected.items()}
    assert max(errors.values()) < EXACT, errors


@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_further_from_float64_than_the_plain_path(dtype: torch.dtype, keep_logits: bool) -> None:
    expected = results(plain, torch.float64)
    of_plain, of_ours = results(plain, dtype), results(ours(keep_logits), dtype)
    assert of_ours["losses"].dtype == torch.float32
    assert of_ours["weight"].dtype == dtype
    for name, exact in expected.items():
        # A tenth and a rounding for luck: the sums are taken in another order.
        allowed = 1.1 * relative_error(of_plain[name], exact) + torch.finfo(torch.float32).eps / 2
        assert relative_error(of_ours[name], exact) < allowed, name


def test_float32_means_float64_where_the_proofs_say_so() -> None:
    hidden, weight, labels, gradient = make_inputs()
    expected = results(plain, torch.float64)
    hidden, weight = (x.bfloat16().double().requires_grad_() for x in (hidden, weight))
    with float64():
        losses = ours()(hidden, weight, labels)
        (losses.float() * gradient).sum().backward()
    assert losses.dtype == torch.float64
    assert relative_error(weight.grad, expected["weight"]) < EXACT
    assert relative_error(hidden.grad, expected["hidden"]) < EXACT


def test_ignored_rows_hold_anything() -> None:
    hidden, weight, labels, _ = make_inputs()
    hidden[0] = torch.inf
    hidden.requires_grad_()
    weight.requires_grad_()
    losses, hits = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    assert losses[0] == 0
    assert not hits[labels == IGNORED].any()
    assert hidden.grad[labels == IGNORED].count_nonzero() == 0


def test_hits() -> None:
    hidden, weight, labels, _ = make_inputs()
    best = (hidden @ weight.T).argmax(-1)
    labels[::2] = best[::2]
    labels[2] = IGNORED
    _, hits = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(hits, labels == best)
    same = torch.ones(1, WIDTH, dtype=torch.float64)
    assert linear_cross_entropy(same, torch.ones_like(weight), torch.tensor([0]))[1]
    assert not linear_cross_entropy(same, torch.ones_like(weight), torch.tensor([500]))[1]


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_costs_nothing(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, _ = make_inputs()
    (weight if frozen == "hidden" else hidden).requires_grad_()
    products = []
    add, multiply = operation._add_product, torch.mm
    monkeypatch.setattr(operation, "_add_product", lambda *args: (products.append("hidden"), add(*args)))
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: (products.append("weight"), multiply(*args, **kwargs)))
    losses, _ = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    assert frozen not in products
    assert products


def test_no_rows() -> None:
    _, weight, _, _ = make_inputs()
    weight.requires_grad_()
    hidden = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    losses, hits = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == hits.shape == (0,)
    assert weight.grad.count_nonzero() == 0


def test_gradients_are_added_where_megatron_keeps_them() -> None:
    hidden, weight, labels, gradient = make_inputs()
    expected = results(plain, torch.float64)["weight"]
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    weight.main_grad = torch.ones(VOCABULARY, WIDTH)
    weight.grad_added_to_main_grad = False
    for shared in (False, True):
        weight.grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = None, False, shared
        losses, _ = linear_cross_entropy(hidden, weight, labels, accumulate_main_grad=True)
        losses.backward(gradient.float())
        assert weight.grad_added_to_main_grad
        assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0  # what Megatron adds of a weight with other uses
    # Ones, and twice the gradient, whose logits are bfloat16.
    assert relative_error(weight.main_grad - 1, 2 * expected) < 2e-2
    weight.grad = None
    linear_cross_entropy(hidden, weight, labels)[0].backward(gradient.float())
    assert relative_error(weight.grad, expected) < 2e-2


def test_kept_logits_serve_one_backward() -> None:
    hidden, weight, labels, _ = make_inputs()
    losses, _ = linear_cross_entropy(hidden.requires_grad_(), weight, labels, keep_logits=True)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hidden, weight, labels: (hidden, weight.float(), labels), "one dtype"),
        (lambda hidden, weight, labels: (hidden, weight[:, :-1], labels), "expected; got"),
        (lambda hidden, weight, labels: (hidden, weight, labels[:-1]), "expected; got"),
    ],
)
def test_refusals(change: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(*make_inputs()[:3]))


# The layer, on tensor-parallel ranks


def layer_losses(folder: Path, sequence_parallel: bool, batch: int) -> None:
    """The layer's losses, hits and gradients on this rank are those of one rank."""
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    from models.common import parallel_layers
    from models.common.output_layer import let_compute_losses

    use_small_chunks(setattr, lambda mapping, key, value: mapping.__setitem__(key, value))
    group = parallel_state.get_tensor_model_parallel_group()
    rank, size = group.rank(), group.size()
    hidden, weight, labels, gradient = make_inputs()
    hidden, labels, gradient = (x[: 4 * 8] for x in (hidden, labels, gradient))
    hidden = hidden.view(-1, batch, WIDTH)  # [S, B, H]
    labels, gradient = (x.view(batch, -1) for x in (labels, gradient))
    labels = labels.clamp(min=0)
    best = (hidden @ weight.T).argmax(-1).T
    labels[:, ::3] = best[:, ::3]
    trained = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    rows = F.pad(trained.flatten().nonzero().flatten(), (0, 5), value=-1)
    whole, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = plain(whole.transpose(0, 1).flatten(0, 1), whole_weight, labels.flatten()).view_as(labels) * trained
    expected.backward(gradient)

    config = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float64,
    )
    layer = parallel_layers.ColumnParallelLinear(
        WIDTH, VOCABULARY, config=config, init_method=torch.nn.init.zeros_, bias=False, gather_output=False
    )
    let_compute_losses(layer, keep_logits=False)
    layer.weight.data.copy_(weight.chunk(size)[rank])
    mine = hidden.chunk(size)[rank] if sequence_parallel else hidden
    mine = mine.clone().requires_grad_()
    losses, hits = layer(mine, losses_of=labels, rows=rows)
    losses.backward(gradient)
    assert relative_error(losses.detach(), expected.detach()) < EXACT
    assert torch.equal(hits, (labels == best) & trained)
    assert relative_error(layer.weight.grad, whole_weight.grad.chunk(size)[rank]) < EXACT
    of_mine = whole.grad.chunk(size)[rank] if sequence_parallel else whole.grad
    assert relative_error(mine.grad, of_mine) < EXACT
    all_losses, _ = layer(mine, losses_of=labels)
    assert relative_error(all_losses[trained], expected[trained]) < EXACT
    logits, _ = layer(mine)
    assert relative_error(logits, (hidden @ weight.T).chunk(size, dim=-1)[rank]) < EXACT


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_two_ranks_share_the_vocabulary(sequence_parallel: bool, batch: int, tmp_path: Path) -> None:
    run_on_ranks(layer_losses, 2, tmp_path, sequence_parallel, batch, tensor_model_parallel_size=2)


# The check at start


def test_the_check_names_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert max(operation.kernel_errors(device).values()) < operation.CHECK_TOLERANCE
    to_grads = operation._logits_to_grads
    monkeypatch.setattr(operation, "_logits_to_grads", lambda *args: to_grads(*args) * 1.1)
    wrong = {name for name, error in operation.kernel_errors(device).items() if error > operation.CHECK_TOLERANCE}
    assert wrong == {"gradient of hidden", "gradient of weight"}
