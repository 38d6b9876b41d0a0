"""Gradient norm of bf16 weights with TP2, EP2 and ETP1, where the optimizer's main parameters are copies.

What a copy forgets of how its parameter lies on the ranks counts twice or not at all in the norm (the other half of
megatron-core #5916). Each gradient is a whole number here, so the norm is exact.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from models.qwen35_vl.configuration import VARIANTS
from tests.ranks import run_on_ranks

SIZES = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
# Name -> gradient of every one of its four elements, on either rank.
GRADIENTS = {"cut": (1.0, 2.0), "replicated": (3.0, 3.0), "expert": (5.0, 7.0)}


class Weights(nn.Module):
    """One parameter of each kind, marked as megatron-core's layers mark theirs."""

    def __init__(self) -> None:
        super().__init__()
        for name in GRADIENTS:
            setattr(self, name, nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16)))
        # tensor_parallel/layers.py, set_tensor_model_parallel_attributes
        for name, parameter in self.named_parameters():
            parameter.tensor_model_parallel = name == "cut"
            parameter.partition_dim, parameter.partition_stride = 0, 1
            parameter.sequence_parallel = False
            parameter.allreduce = name != "expert"


def write_norm(folder: Path, distributed: bool) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.build_decoder import decoder_config

    config = decoder_config(
        VARIANTS["tiny_moe"], torch.bfloat16, **SIZES, sequence_parallel=True, bf16=True, calculate_per_token_loss=False
    )
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    model = DistributedDataParallel(config, settings, Weights())
    options = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=distributed
    )
    optimizer = get_megatron_optimizer(options, [model])
    for name, parameter in model.module.named_parameters():
        parameter.main_grad.fill_(GRADIENTS[name][torch.distributed.get_rank()])
    _, norm, _ = optimizer.step()
    (folder / "norm.json").write_text(json.dumps(float(norm)))


@pytest.mark.parametrize("distributed", [False, True], ids=["copies", "distributed optimizer"])
def test_each_element_counts_once(tmp_path: Path, distributed: bool) -> None:
    run_on_ranks(write_norm, 2, tmp_path, distributed, **SIZES)
    once = [*GRADIENTS["cut"], GRADIENTS["replicated"][0], *GRADIENTS["expert"]]
    expected = sum(4 * value**2 for value in once) ** 0.5
    for rank in range(2):
        assert json.loads((tmp_path / str(rank) / "norm.json").read_text()) == pytest.approx(expected, rel=1e-6)
