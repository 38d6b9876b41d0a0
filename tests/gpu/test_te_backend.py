"""On a GPU: Transformer Engine and flash-linear-attention against the torch backend, on packed documents with images.

The torch backend in float64 is exact here. bfloat16 costs what the torch backend's own bfloat16 run loses against it;
Transformer Engine's run may lose twice as much, since its kernels round at other places.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.qwen35_vl.configuration import VARIANTS, Qwen35VLConfig
from proofs.float64 import float64
from tests.build_model import build_model
from tests.errors import relative_error
from tests.models.test_hf_parity import make_sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("single_rank"),
]

# Head sizes that the GPU kernels are made for.
_HEADS = {"kv_channels": 64, "mrope_section": (3, 3, 2), "linear_key_head_dim": 64, "linear_value_head_dim": 64}
ARCHITECTURES = {name: VARIANTS[name].replace(**_HEADS, vocab_size=1024) for name in ("tiny", "tiny_moe")}
GRIDS = ([], [[1, 6, 10]], [[1, 4, 4], [1, 8, 6], [1, 2, 10]])


def run(architecture: Qwen35VLConfig, folder: Path, impl: str, dtype: torch.dtype, weights: dict[str, Tensor] | None):
    """One packed micro-batch: (weights, losses [1, T], gradients by HF name)."""
    from data.batch import collate, flatten, unflatten
    from forward_step import model_inputs
    from models.qwen35_vl.inputs import Qwen35VLInputs
    from tests.hf_states import export_hf_state, load_hf_state

    flags = ["--transformer-impl", impl, "--allow-slow-kernels"]
    if dtype == torch.bfloat16:
        flags.append("--bf16")  # for experts as one tensor
    if dtype == torch.float64:
        flags += ["--moe-router-dtype", "fp64"]  # else the router calls Transformer Engine's product, which has none
    model = build_model(architecture, folder, dtype, *flags).cuda()
    weights = weights or {name: tensor.clone() for name, tensor in export_hf_state(model, architecture).items()}
    load_hf_state(model, weights, architecture)
    model = model.to(dtype)
    packs = [[make_sample(architecture, grids, dtype)] for grids in GRIDS]
    flat = flatten(
        collate(
            packs,
            Qwen35VLInputs(architecture),
            alignment=1,
            packed=True,
            seq_len=512,
            dtype=dtype,
            pad_token_id=0,
        )
    )
    batch = unflatten(replace(flat, buffer=flat.buffer.cuda()))
    losses = model(**model_inputs(batch))
    (losses.float() * batch.loss_mask).sum().backward()
    gradients = export_hf_state(model, architecture, value=lambda parameter: parameter.grad)
    return weights, losses.detach(), {name: gradient.double() for name, gradient in gradients.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformer_engine_equals_torch(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    with float64():
        weights, exact, exact_gradients = run(architecture, tmp_path, "local", torch.float64, None)
    weights = {key: tensor.bfloat16().to(tensor.dtype) for key, tensor in weights.items()}
    with float64():
        _, exact, exact_gradients = run(architecture, tmp_path, "local", torch.float64, weights)
    _, plain, plain_gradients = run(architecture, tmp_path, "local", torch.bfloat16, weights)
    _, fused, fused_gradients = run(architecture, tmp_path, "transformer_engine", torch.bfloat16, weights)

    noise = relative_error(plain.double(), exact)
    print(f"{name}: losses differ by {relative_error(fused.double(), exact):.2e}, torch in bfloat16 by {noise:.2e}")
    errors = {
        key: (relative_error(fused_gradients[key], gradient), relative_error(plain_gradients[key], gradient))
        for key, gradient in exact_gradients.items()
        if gradient.norm() > 0
    }
    worst = sorted(errors, key=lambda key: errors[key][0], reverse=True)[:5]
    for key in worst:
        print(f"  {key}: {errors[key][0]:.2e}, torch in bfloat16 {errors[key][1]:.2e}")
    assert relative_error(fused.double(), exact) < 2 * noise
    bfloat16 = max(error for _, error in errors.values())
    for key, (error, _) in errors.items():
        # A router's gradient jumps where rounding sends a token to another expert.
        assert error < (4 if key.endswith("mlp.gate.weight") else 2) * bfloat16, key
