"""What has to be mended in megatron-core itself: defects that no argument, subclass or spec reaches.

`apply()` mends them, on every device. Each function below states the defect, where it is, and why nothing else reaches
it; tests/runtime/test_mends.py fails for a mend whose defect is gone, so that it can go too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

KNOWN_VERSION = (0, 19, 2)


class UnknownMegatronVersion(RuntimeError):
    """The installed megatron-core isn't the one whose defects are known."""


def apply() -> None:
    """Mend megatron-core; calling it again changes nothing.

    Raises:
        UnknownMegatronVersion: the installed version isn't `KNOWN_VERSION`.
    """
    from megatron.core import package_info

    # Not __version__, which gains the commit of whatever git repository holds the environment.
    version = (package_info.MAJOR, package_info.MINOR, package_info.PATCH)
    if version != KNOWN_VERSION:
        raise UnknownMegatronVersion(
            f"megatron-core {package_info.__shortversion__} is installed, but runtime/mends.py knows the defects of "
            f"{'.'.join(map(str, KNOWN_VERSION))}. Install that, or check "
            f"{', '.join(mend.__name__ for mend in MENDS)} against the new version and set KNOWN_VERSION "
            "(tests/runtime/test_mends.py tells which mends can go)."
        )
    _apply_all()


@functools.cache
def _apply_all() -> None:
    for mend in MENDS:
        mend()


def dataset_helpers_come_compiled() -> None:
    """0.19.2, core/datasets/utils.py:21: `compile_helpers()` runs `make` and exits the process when that fails.

    The wheel ships the compiled helper and no Makefile, so it always fails, and `initialize_megatron()` calls it on
    rank 0 whatever the arguments (training/initialize.py:151; `--lazy-mpu-init` alone avoids it, with all of the
    initialisation).
    """
    from megatron.core.datasets import utils

    def helpers_are_there() -> None:
        from megatron.core.datasets import helpers_cpp  # noqa: F401  an ImportError here names what is missing

    utils.compile_helpers = helpers_are_there


def gated_delta_net_takes_other_kernels() -> None:
    """0.19.2, core/ssm/gated_delta_net/common.py:140: the constructor raises without flash-linear-attention.

    A subclass that brings its own kernels must call that constructor. With the flag set, megatron-core's own
    GatedDeltaNet still refuses: its kernel is None, which the same constructor asserts against.
    """
    from megatron.core.ssm.gated_delta_net import common

    common.HAVE_FLA = True


def recomputation_without_transformer_engine() -> None:
    """0.19.2, core/tensor_parallel/random.py:740: `self.fp8 = fp8 is not None`, while the default is False.

    So every output-discarding recomputation (`--recompute-modules layernorm`, `moe_act`, `gdn_norm_out`) takes the
    FP8 path and raises NameError without Transformer Engine. The layers call it without the argument.
    """
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    original = CheckpointWithoutOutput.__init__

    @functools.wraps(original)
    def init(self: CheckpointWithoutOutput, fp8: Any = None) -> None:
        original(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = init


MENDS: tuple[Callable[[], None], ...] = (
    dataset_helpers_come_compiled,
    gated_delta_net_takes_other_kernels,
    recomputation_without_transformer_engine,
)
