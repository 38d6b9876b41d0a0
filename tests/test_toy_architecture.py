"""A new architecture needs a registry entry and nothing else: entry, forward step and arguments stay as they are."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MODEL_REGISTRY, BatchShape, ModelSpec

pytestmark = pytest.mark.heavy

VOCABULARY = 256


class ToyVisionEncoder(nn.Module):
    """Two linear layers over merged patches."""

    def __init__(self, patch_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4 * patch_dim, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.layers(pixel_values.view(pixel_values.size(0) // 4, -1))


@dataclass(frozen=True)
class ToyInputs:
    image_token_id: int = VOCABULARY - 1
    merge_size: int = 2
    patch_size: int = 16
    patch_dim: int = 3 * 2 * 16 * 16
    further_tokens: int = 0

    def position_ids(self, input_ids: Tensor, grid_thw: Tensor) -> Tensor:
        return torch.arange(len(input_ids)).expand(3, -1)

    def vision_inputs(self, grid_thw: Tensor) -> dict[str, Tensor | int]:
        return {}

    def flops(self, shape: BatchShape) -> float:
        return 1e9 * sum(shape.document_lengths)


@dataclass(frozen=True)
class ToyConfig:
    hidden_size: int = 32
    vocab_size: int = VOCABULARY

    def to_flags(self) -> list[str]:
        numbers = {
            "--num-layers": 2,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": 64,
            "--num-attention-heads": 2,
            "--max-position-embeddings": 256,
            "--vocab-size": self.vocab_size,
            "--padded-vocab-size": self.vocab_size,
            "--position-embedding-type": "rope",
            "--normalization": "RMSNorm",
        }
        switches = ["--no-persist-layer-norm", "--no-masked-softmax-fusion"]
        return [*(text for pair in numbers.items() for text in map(str, pair)), *switches]

    def with_flags(self, args: Namespace) -> ToyConfig:
        return replace(self, hidden_size=args.hidden_size)

    def to_hf(self) -> dict[str, Any]:
        return {"model_type": "toy", "hidden_size": self.hidden_size}


def build_toy(args: Namespace, config: ToyConfig, language_config: Any, **stage: Any) -> nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from models.base import MultimodalModel

    language_model = GPTModel(
        config=language_config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=config.vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type="rope",
        scatter_embedding_sequence_parallel=False,
        **stage,
    )
    vision_model = ToyVisionEncoder(ToyInputs.patch_dim, config.hidden_size) if stage["pre_process"] else None
    return MultimodalModel(
        language_config,
        language_model=language_model,
        vision_model=vision_model,
        pg_collection=stage["pg_collection"],
    )


TOY = ModelSpec(
    variants={"toy": ToyConfig()},
    from_hf=lambda config: ToyConfig(config["hidden_size"]),
    check_layout=lambda args, config: [],
    check_kernels=lambda args, config: None,
    build_model=build_toy,
    model_inputs=lambda config, trained: ToyInputs(),
)


def test_toy_architecture_trains(tmp_path: Path) -> None:
    flags = [
        *("--model-arch", "toy", "--dataset-provider", "mock", "--seq-length", "128", "--image-size", "64"),
        *("--image-seq-length", "8", "--micro-batch-size", "2", "--global-batch-size", "4", "--train-iters", "2"),
        *(
            "--lr",
            "1e-3",
            "--hidden-size",
            "48",
            "--eval-iters",
            "0",
            "--num-workers",
            "0",
            "--log-interval",
            "1",
            "--bf16",
        ),
        *("--save-interval", "2", "--eval-interval", "2"),
        *("--save", str(tmp_path / "checkpoints"), "--tensorboard-dir", str(tmp_path / "tensorboard")),
    ]
    # Its own process: Megatron's arguments and groups are global.
    run = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "iteration        2/       2" in run.stdout
    assert json.loads((tmp_path / "checkpoints/hf/config.json").read_text()) == {"model_type": "toy", "hidden_size": 48}
    assert (tmp_path / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
    assert (tmp_path / "loss.png").exists()


if __name__ == "__main__":
    MODEL_REGISTRY["toy"] = TOY
    from pretrain_multimodal import main

    main()
