"""Our model as training builds it: an architecture becomes flags, flags become configurations, these the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.qwen35_vl.configuration import Qwen35VLConfig

if TYPE_CHECKING:
    from arguments import CommandLine

# Megatron insists on these; the parity tests' sequences have any length.
REQUIRED_FLAGS = ("--micro-batch-size", "1", "--seq-length", "64", "--train-iters", "1", "--lr", "1e-4")
# No auxiliary loss: transformers' loss has none.
MOE_FLAGS = ("--moe-aux-loss-coeff", "0")


def command_line_of(architecture: Qwen35VLConfig, folder: Path, *flags: str) -> CommandLine:
    """The checked command line of an architecture, by way of a config.json in `folder`."""
    import arguments

    (folder / "config.json").write_text(json.dumps(architecture.to_hf()))
    moe = MOE_FLAGS if architecture.is_moe else ()
    return arguments.preflight_or_exit(["--hf-config", str(folder), *REQUIRED_FLAGS, *moe, *flags])


def build_model(
    architecture: Qwen35VLConfig,
    folder: Path,
    dtype: torch.dtype,
    *flags: str,
    pre_process: bool = True,
    post_process: bool = True,
    **settings: Any,
) -> torch.nn.Module:
    """This rank's `MultimodalModel` in `dtype`; megatron-core's process groups must be there.

    Args:
        flags: more of the command line.
        pre_process, post_process: this is the first, the last pipeline stage.
        settings: attributes of the decoder's TransformerConfig that no flag reaches here.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args

    import arguments
    from pretrain_multimodal import model_provider

    command_line = command_line_of(architecture, folder, *flags)
    args = arguments.resolve(command_line)
    config = core_transformer_config_from_args(args)
    for name, value in {"params_dtype": dtype, **settings}.items():
        setattr(config, name, value)
    return model_provider(
        command_line.spec, command_line.config, args, pre_process=pre_process, post_process=post_process, config=config
    )
