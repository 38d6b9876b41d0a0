"""What this machine can run, found without importing torch (an import of it takes seconds)."""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True)
class Machine:
    """gpus: CUDA devices that this process sees; the others: packages that Python finds, not imported, and programs."""

    gpus: int
    transformer_engine: bool
    flash_linear_attention: bool
    fused_weight_gradients: bool  # Apex's extension, which --gradient-accumulation-fusion needs
    wandb: bool
    compiler: bool = True  # C++ and ninja: what torch.utils.cpp_extension builds with


def detect() -> Machine:
    return Machine(
        gpus=count_gpus(),
        transformer_engine=find_spec("transformer_engine") is not None,
        flash_linear_attention=find_spec("fla") is not None,
        fused_weight_gradients=find_spec("fused_weight_gradient_mlp_cuda") is not None,
        wandb=find_spec("wandb") is not None,
        compiler=bool(shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja")),
    )


def count_gpus() -> int:
    """CUDA devices by the driver itself, which honours CUDA_VISIBLE_DEVICES; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


if __name__ == "__main__":
    print(count_gpus())
