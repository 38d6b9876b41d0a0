"""The router's auxiliary losses: their gradient is the coefficient times the mean over micro-batches, whatever share of
the tokens is trained or padded. In float64, after the division by trained tokens that Megatron does at a step's end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.build_decoder import build_decoder, decoder_config, document_inputs, pack, perturb
from tests.errors import relative_error

pytestmark = pytest.mark.usefixtures("single_rank")

TINY_MOE = VARIANTS["tiny_moe"]
COEFFICIENT = 0.5
TOLERANCE = 1e-9  # measured: 2e-14 on the difference of two runs, 1e-15 on a router alone


@pytest.fixture(autouse=True)
def clean_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(1.0))
    yield
    get_moe_metrics_tracker().clear()


def make_router(**changes: Any) -> nn.Module:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from models.common.moe import PerTokenLossRouter

    config = decoder_config(TINY_MOE, torch.float64, **{"moe_aux_loss_coeff": COEFFICIENT, **changes})
    router = PerTokenLossRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    router.weight.data.copy_(torch.randn(4, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8)
    return router


def hidden_states(tokens: int) -> Tensor:
    return torch.randn(tokens, 1, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def router_gradient(router: nn.Module, hidden: Tensor, padding: Tensor | None) -> Tensor:
    """Of the auxiliary losses alone: nothing else depends on the probabilities."""
    router.weight.grad = None
    probabilities, _ = router(hidden, padding)
    (probabilities * 0).sum().backward()
    return router.weight.grad


def balance_loss(weight: Tensor, hidden: Tensor) -> Tensor:
    """Experts times the sum over experts of (share of assignments) * (mean probability)."""
    probabilities = (hidden.squeeze(1) @ weight.T).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(2, dim=-1).indices, 1.0)
    return 4 * (chosen.mean(0) / 2 * probabilities.mean(0)).sum()


def z_loss(weight: Tensor, hidden: Tensor) -> Tensor:
    return (hidden.squeeze(1) @ weight.T).logsumexp(-1).square().mean()


LOSSES = {
    "balance": ({}, balance_loss),
    "z": ({"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": COEFFICIENT}, z_loss),
}


@pytest.mark.parametrize("padded", [0, 14])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_leaves_padding_out(loss: str, padded: int) -> None:
    changes, formula = LOSSES[loss]
    hidden = hidden_states(40)
    padding = torch.arange(40)[:, None] >= 40 - padded
    with float64():
        router = make_router(**changes)
        router.step.mean_trained_tokens = 7.0
        actual = router_gradient(router, hidden, padding if padded else None)
        expected = torch.autograd.grad(formula(router.weight, hidden[: 40 - padded]), router.weight)[0]
    assert relative_error(actual / 7.0, COEFFICIENT * expected) < TOLERANCE


def step_gradients(masks: list[Tensor], coefficient: float) -> dict[str, Tensor]:
    """A step of one micro-batch per mask, as Megatron's schedules and finalize_model_grads run it."""
    from models.common.moe import share_step

    trained = torch.stack([mask.sum() for mask in masks])
    with float64():
        model = build_decoder(TINY_MOE, moe_aux_loss_coeff=coefficient).double()
        share_step(model).mean_trained_tokens = trained.mean()
        perturb(model)
        for index, mask in enumerate(masks):
            documents = document_inputs([20, 8], TINY_MOE.vocab_size, seed=index)
            inputs = {**pack(documents), "loss_mask": mask}
            padding = torch.arange(28)[None] >= 25
            (model(attention_mask=None, padding_mask=padding, **inputs) * mask).sum().backward()
    return {name: p.grad / trained.sum() for name, p in model.named_parameters()}


def auxiliary_gradients(masks: list[Tensor]) -> dict[str, Tensor]:
    """What the auxiliary loss adds to a step's gradients."""
    with_loss, without = (step_gradients(masks, coefficient) for coefficient in (COEFFICIENT, 0.0))
    return {name: gradient - without[name] for name, gradient in with_loss.items()}


def test_loss_mask_leaves_auxiliary_gradients_alone() -> None:
    """Of routers, and of everything in front of them, though micro-batches train different shares of their tokens."""
    first, second = torch.zeros(2, 1, 28), torch.zeros(2, 1, 28)
    first[0, :, 3:20] = 1.0
    first[1, :, 5] = 1.0
    second[0, :, 7] = 1.0
    second[1, :, 10:12] = 1.0
    expected, actual = (auxiliary_gradients(list(masks)) for masks in (first, second))
    moved = {name: gradient for name, gradient in expected.items() if gradient.norm() > 1e-6}
    assert sum("router" in name for name in moved) == 5
    errors = {name: relative_error(actual[name], gradient) for name, gradient in moved.items()}
    assert max(errors.values()) < TOLERANCE, errors


def test_padding_leaves_every_gradient_alone() -> None:
    """Documents with and without padding behind them; to MTP's router a token without a next one is padding too."""
    from models.common.moe import share_step

    documents = document_inputs([20, 8], TINY_MOE.vocab_size)
    for document in documents:
        document["padding_mask"] = torch.zeros_like(document["input_ids"], dtype=torch.bool)
    padded = [{name: nn.functional.pad(value, (0, 4)) for name, value in document.items()} for document in documents]
    for document in padded:
        document["padding_mask"][:, -4:] = True
    gradients = []
    for inputs in (pack(documents), pack(padded)):
        with float64():
            model = build_decoder(TINY_MOE, moe_aux_loss_coeff=COEFFICIENT).double()
            share_step(model).mean_trained_tokens = 5.0
            perturb(model)
            (model(attention_mask=None, **inputs) * inputs["loss_mask"]).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    errors = {name: relative_error(gradients[1][name], gradient) for name, gradient in gradients[0].items()}
    assert max(errors.values()) < TOLERANCE, errors


def test_training_without_the_count_is_refused() -> None:
    router = make_router()
    with pytest.raises(RuntimeError, match="mean_trained_tokens"):
        router(hidden_states(8), None)
    router.eval()(hidden_states(8), None)
    make_router(moe_aux_loss_coeff=0.0)(hidden_states(8), None)


def test_auxiliary_losses_need_a_loss_per_token() -> None:
    with pytest.raises(ValueError, match="--calculate-per-token-loss"):
        make_router(calculate_per_token_loss=False)


def test_logged_losses_are_means() -> None:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    hidden = hidden_states(40)
    with float64():
        router = make_router(moe_z_loss_coeff=0.25)
        router.step.mean_trained_tokens = 3.0
        router(hidden, None)
        expected = {"load_balancing_loss": balance_loss, "z_loss": z_loss}
        for name, formula in expected.items():
            logged = get_moe_metrics_tracker().metrics[name].values
            assert relative_error(logged[0], formula(router.weight, hidden)) < TOLERANCE
