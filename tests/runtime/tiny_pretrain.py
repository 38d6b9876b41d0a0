"""Runs `megatron.training.pretrain()` on a two-layer GPTModel, several times in one process.

    [torch.distributed.run --nproc-per-node N] tests/runtime/tiny_pretrain.py RUNS.json

RUNS.json: {"out": folder, "runs": {name: [Megatron flags besides FLAGS]}}. Each run writes `out/NAME-losses.json`, the
mean loss of each iteration in full precision. Not a test: a program that test_pretrain.py starts.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from runtime import prepare

prepare()

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.training import get_args, pretrain  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    core_transformer_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.training import destroy_global_state  # noqa: E402
from torch import Tensor, nn  # noqa: E402

FLAGS = """
--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 16
--max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 --min-lr 1e-3
--lr-decay-style cosine --transformer-impl local --normalization RMSNorm --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --position-embedding-type rope --no-rope-fusion --no-persist-layer-norm
--no-gradient-accumulation-fusion --attention-backend unfused --attention-dropout 0 --hidden-dropout 0
--calculate-per-token-loss --tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 1
--dataloader-type external --eval-iters 1 --eval-interval 1000 --log-interval 1 --use-distributed-optimizer
--ckpt-format torch_dist --distributed-timeout-minutes 5 --no-one-logger
"""


class Norm(nn.RMSNorm):
    """Megatron's wrapper of torch's norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


def build_model(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: TransformerConfig | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    layer = get_gpt_layer_local_spec(num_experts=args.num_experts)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    return GPTModel(
        config,
        TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), layer_norm=Norm),
        args.padded_vocab_size,
        args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
    )


def batches(args: Namespace, first_sample: int) -> Iterator[Tensor]:
    """This rank's micro-batches [micro_batch, seq_length + 1] of random tokens, a function of the sample's number."""
    sample = first_sample + mpu.get_data_parallel_rank() * args.micro_batch_size
    while True:
        generators = [torch.Generator().manual_seed(sample + i) for i in range(args.micro_batch_size)]
        yield torch.stack([torch.randint(64, (args.seq_length + 1,), generator=generator) for generator in generators])
        sample += mpu.get_data_parallel_world_size() * args.micro_batch_size


def datasets(num_samples: list[int]) -> tuple[Iterator[Tensor], Iterator[Tensor], None]:
    args = get_args()
    return batches(args, args.consumed_train_samples), batches(args, 10**6), None


datasets.is_distributed = True


def run() -> list[float]:
    """One call of pretrain() with `sys.argv`; the mean loss per iteration, over all ranks that compute one."""
    sums: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def loss(model: nn.Module, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int)
        report = torch.stack([total.detach(), count.float()])
        if model.training:
            sums[get_args().curr_iteration] += report.double()
        return total, count, {"lm loss": report}

    def forward_step(data: Iterator[Tensor], model: nn.Module) -> tuple[Tensor, partial]:
        tokens = next(data).cuda()
        positions = torch.arange(tokens.size(1) - 1, device=torch.cuda.current_device()).expand(len(tokens), -1)
        return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()), partial(loss, model)

    args = parse_and_validate_args()
    # Without torchrun's rendezvous a store in memory serves one rank.
    store = torch.distributed.HashStore() if args.world_size == 1 else None
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        build_model,
        store=store,
    )
    means = torch.zeros(args.train_iters, 2, dtype=torch.float64)
    for iteration, pair in sums.items():
        means[iteration] = pair
    torch.distributed.all_reduce(means)
    return (means[:, 0] / means[:, 1].clamp(min=1)).tolist()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    for name, flags in job["runs"].items():
        sys.argv = [sys.argv[0], *FLAGS.split(), *flags]
        losses = run()
        if torch.distributed.get_rank() == 0:
            (Path(job["out"]) / f"{name}-losses.json").write_text(json.dumps(losses))
        destroy_global_state()  # but the default process group, which the next run goes on with
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
