"""The router's auxiliary losses on ranks that hold different numbers of real tokens, against one rank. In float64.

megatron-core #7481: with a padding mask, the parent reads the number of local tokens after an in-place all-reduce.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.qwen35_vl.configuration import VARIANTS
from proofs.float64 import float64
from tests.errors import relative_error
from tests.models.test_moe import COEFFICIENT, LOSSES, TOLERANCE, hidden_states
from tests.ranks import run_on_ranks

RANKS, TOKENS, TRAINED = 2, 20, 7.0
REAL = (20, 5)  # of each rank's tokens
GROUPS = {
    "tp": {"tensor_model_parallel_size": RANKS},
    "cp": {"context_parallel_size": RANKS},
}


def padding(rank: int) -> Tensor:
    """[TOKENS, 1] bool."""
    return torch.arange(TOKENS)[:, None] >= REAL[rank]


def write_gradient(folder: Path, loss: str, kind: str) -> None:
    """One rank's share of the router's gradient."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from models.common.moe import PerTokenLossRouter
    from tests.build_decoder import decoder_config

    rank = torch.distributed.get_rank()
    changes, _ = LOSSES[loss]
    sizes = {**GROUPS[kind], "sequence_parallel": kind == "tp"}
    config = decoder_config(
        VARIANTS["tiny_moe"], torch.float64, **{"moe_aux_loss_coeff": COEFFICIENT, **changes, **sizes}
    )
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    with float64():
        router = PerTokenLossRouter(config, ProcessGroupCollection.use_mpu_process_groups())
        router.set_layer_number(1)
        router.weight.data.copy_(weight())
        router.step.mean_trained_tokens = TRAINED
        probabilities, _ = router(hidden_states(RANKS * TOKENS)[rank * TOKENS :][:TOKENS], padding(rank))
        (probabilities * 0).sum().backward()
    torch.save(router.weight.grad, folder / "gradient.pt")


def weight() -> Tensor:
    return torch.randn(4, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 8


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("loss", LOSSES)
def test_ranks_with_different_numbers_of_real_tokens(tmp_path: Path, loss: str, kind: str) -> None:
    """The ranks' gradients add up to that of the loss over all real tokens."""
    run_on_ranks(write_gradient, RANKS, tmp_path, loss, kind, **GROUPS[kind])
    total = sum(torch.load(tmp_path / str(rank) / "gradient.pt", weights_only=True) for rank in range(RANKS))
    real = ~torch.cat([padding(rank) for rank in range(RANKS)])[:, 0]
    assert real.sum() == sum(REAL)
    parameter = weight().requires_grad_()
    expected = torch.autograd.grad(LOSSES[loss][1](parameter, hidden_states(RANKS * TOKENS)[real]), parameter)[0]
    assert relative_error(total / TRAINED, COEFFICIENT * expected) < TOLERANCE
