"""What ranks need and takes long to import; see `tests.ranks`."""

from runtime import prepare

prepare()

import megatron.training  # noqa: E402, F401

import data.loader  # noqa: E402, F401
import forward_step  # noqa: E402, F401
import models.qwen35_vl.model  # noqa: E402, F401
import pretrain_multimodal  # noqa: E402, F401
