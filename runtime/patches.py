"""Patches of megatron-core itself: defects that no argument, subclass or spec reaches.

`apply()` patches them, on every device. Each function below states the defect, where it is, and why nothing else
reaches it; tests/runtime/test_patches.py fails for a patch whose defect is gone, so that it can go too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from runtime import parameter_groups

KNOWN_VERSION = (0, 19, 2)


class UnknownMegatronVersion(RuntimeError):
    """The installed megatron-core isn't the one whose defects are known."""


def apply() -> None:
    """Patch megatron-core; calling it again changes nothing.

    Raises:
        UnknownMegatronVersion: the installed version isn't `KNOWN_VERSION`.
    """
    from megatron.core import package_info

    # Not __version__, which gains the commit of whatever git repository holds the environment.
    version = (package_info.MAJOR, package_info.MINOR, package_info.PATCH)
    if version != KNOWN_VERSION:
        raise UnknownMegatronVersion(
            f"megatron-core {package_info.__shortversion__} is installed, but runtime/patches.py knows the defects of "
            f"{'.'.join(map(str, KNOWN_VERSION))}. Install that, or check "
            f"{', '.join(patch.__name__ for patch in PATCHES)} against the new version and set KNOWN_VERSION "
            "(tests/runtime/test_patches.py tells which patches can go)."
        )
    _apply_all()


@functools.cache
def _apply_all() -> None:
    for patch in PATCHES:
        patch()


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


def optimizer_resumes_fp32_parameters() -> None:
    """0.19.2, core/optimizer/distrib_optimizer.py:2061: `load_parameter_state_from_dp_reshardable` lacks no_grad.

    Its siblings for the other formats have it. The main copy of a parameter that is fp32 in the model is a view of that
    parameter, into which autograd then refuses to copy: an fp32 run, or a bf16 run with fp32 parameters (A_log), can't
    resume. The distributed optimizer is built inside `get_megatron_optimizer()`; no argument chooses its class.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer.load_parameter_state_from_dp_reshardable
    DistributedOptimizer.load_parameter_state_from_dp_reshardable = torch.no_grad()(load)


def optimizer_resumes_without_fused_adam() -> None:
    """0.19.2, core/optimizer/distrib_optimizer.py:839, :1028 and :1222: resuming with torch's Adam (no Apex, no TE).

    Loading starts from `state_dict()`, which asserts that all parameters are at one step; before the first step torch's
    Adam has no state, so nothing can be loaded. Past that, all parameters get one and the same step tensor, which each
    parameter's update then increments: with N parameters, Adam's bias correction runs N times too fast. At last the
    step is overwritten with what it was before loading (dp_reshardable format), or missing, a KeyError (the others).
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    optimizer_class = distrib_optimizer.DistributedOptimizer
    original_state_dict = optimizer_class.state_dict
    original_load = optimizer_class.load_state_dict
    original_set = optimizer_class._set_main_param_and_optimizer_states

    @functools.wraps(original_state_dict)
    def state_dict(self: Any) -> dict[str, Any]:
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            _own_steps(self.optimizer, 0.0)
        return original_state_dict(self)

    @functools.wraps(original_load)
    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        original_load(self, state)
        _own_steps(self.optimizer)

    @functools.wraps(original_set)
    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        original_set(self, model_param, {**tensors, "step": None})  # None: keep what load_state_dict() set

    optimizer_class.state_dict = state_dict
    optimizer_class.load_state_dict = load_state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_states


def _own_steps(optimizer: torch.optim.Optimizer, step: float | None = None) -> None:
    """Give every parameter its own step tensor, set to `step` or to what it had."""
    for state in optimizer.state.values():
        state["step"] = torch.tensor(state["step"].item() if step is None else step)


def optimizer_saves_mixed_parameters() -> None:
    """0.19.2, core/optimizer/distrib_optimizer.py:337 and :487: two orders of a group's parameters.

    One is by gradient buffer, 16-bit parameters before fp32 ones; the optimizer's own puts fp32 first. An index into
    the one is looked up in the other whenever states are saved or loaded: a bf16 model with fp32 parameters (A_log)
    can't be saved. Both are built inside the constructor; no argument chooses the class.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._build_optimizer_group_ranges.__func__

    @functools.wraps(original)
    def fp32_first(cls: type, param_groups: list[dict], gbuf_ranges: list[dict]) -> tuple[dict, list[dict]]:
        places, ranges = original(cls, param_groups, gbuf_ranges)
        for index, group in enumerate(ranges):
            group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
            for order, parameter in enumerate(group["params"]):
                places[parameter] = (index, order)
        return places, ranges

    DistributedOptimizer._build_optimizer_group_ranges = classmethod(fp32_first)


def fused_aux_loss_takes_padding() -> None:
    """0.19.2, core/transformer/moe/moe_utils.py:277: with a padding mask the number of tokens is a float.

    Transformer Engine's fused auxiliary loss (`--moe-router-fusion`) takes int64 alone and raises. The number comes
    from a function of the module, which the router calls by name in the middle of its own.
    """
    from megatron.core.transformer.moe import router

    original = router.get_tokens_per_expert_and_token_count

    @functools.wraps(original)
    def whole_tokens(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        per_expert, *numbers = original(*args, **kwargs)
        return per_expert, *(n.long() if isinstance(n, torch.Tensor) else n for n in numbers)

    router.get_tokens_per_expert_and_token_count = whole_tokens


def fsdp_optimizer_states_agree() -> None:
    """0.19.2, core/optimizer/distrib_optimizer.py:1648: the ranks of Megatron-FSDP list different optimizer states.

    A rank whose share of a parameter is empty gets no gradient for it
    (fsdp/src/megatron_fsdp/param_and_grad_buffer.py:3393) and so no state; the others do, and saving or loading
    `fsdp_dtensor` takes a collective for each entry, in the order of the entries: it hangs, or puts one parameter's
    offsets to another. The optimizer is built inside `get_megatron_optimizer()`; no argument chooses its class.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original_state = DistributedOptimizer.sharded_param_state_fsdp_dtensor
    original_dummies = DistributedOptimizer._init_optimizer_states_with_dummy_values

    @functools.wraps(original_state)
    def sharded_state(self: Any, is_loading: bool = False) -> dict[str, Any]:
        if not is_loading and self.optimizer.state:
            _complete_states(self)
        return original_state(self, is_loading)

    @functools.wraps(original_dummies)
    def dummies(self: Any) -> None:
        original_dummies(self)
        _complete_states(self)

    DistributedOptimizer.sharded_param_state_fsdp_dtensor = sharded_state
    DistributedOptimizer._init_optimizer_states_with_dummy_values = dummies


def _complete_states(optimizer: Any) -> None:
    """Give every parameter of a `DistributedOptimizer` a state, in the order of its groups."""
    inner = optimizer.optimizer
    # torch's Adam keeps the step beside the moments, the fused ones in the group.
    steps = [state["step"] for state in inner.state.values() if "step" in state]
    optimizer.init_state_fn(inner, optimizer.config)
    states = {parameter: inner.state[parameter] for group in inner.param_groups for parameter in group["params"]}
    for parameter, state in states.items() if steps else ():
        share = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not share.numel():
            # Nothing counts it up, and any rank's may be the one that is saved.
            state["step"] = max(steps).clone()
    inner.state.clear()
    inner.state.update(states)


def fsdp_checkpoint_without_16_bit_wrapper() -> None:
    """0.19.2, core/transformer/fsdp_dtensor_checkpoint.py:343: saving `fsdp_dtensor` looks under `module.` once more.

    The level is `Float16Module`'s, so that a float32 model with SwiGLU can't be saved or loaded. The function is called
    by name in the middle of saving and loading.
    """
    from megatron.core.transformer.module import Float16Module
    from megatron.training import checkpointing

    original = checkpointing.handle_swiglu_in_state_dict

    @functools.wraps(original)
    def handle_swiglu(model: torch.nn.Module, *state_dicts: Any) -> tuple[Any, Any]:
        wrapped = isinstance(model.module, Float16Module)
        return original(model if wrapped else _WithLevel(model), *state_dicts)

    checkpointing.handle_swiglu_in_state_dict = handle_swiglu


class _WithLevel:
    """A `MegatronFSDP` whose parameters are found with and without a `module.` too many."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.nn.Parameter:
        return self._model.get_parameter(name.replace("module.module.", "module.", 1))


def fsdp_keeps_parameters_marks() -> None:
    """0.19.2, core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py:3121: one mark is kept.

    A parameter from the meta device is another object once it has memory, and `_reset_parameters` copies one of what
    was set on it. Lost is how TP slices it, whether it is an expert's, under sequence parallelism, an embedding. The
    buffer is built inside `MegatronFSDP`; no argument chooses its class.
    """
    from megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer import ParamAndGradBuffer

    original = ParamAndGradBuffer._reset_parameters

    @functools.wraps(original)
    def reset(self: Any, old_params: list[torch.nn.Parameter], new_params: list[torch.nn.Parameter]) -> None:
        for old, new in zip(old_params, new_params, strict=True):
            vars(new).update({**vars(old), **vars(new)})
        original(self, old_params, new_params)

    ParamAndGradBuffer._reset_parameters = reset


def optimizer_saves_buckets_in_place() -> None:
    """0.19.2, core/optimizer/distrib_optimizer.py:1785: fully reshardable states are cut at the wrong offsets.

    Gathering drops the padding between a buffer's buckets (:1395), while a parameter's start counts it. So with more
    than one bucket (tied embeddings over pipeline stages have their own, `--overlap-grad-reduce` makes many) all
    after the first padded one are saved under their neighbours' names, and a run that resumes from them is spoilt
    without an error; upstream pads the end with zeros and warns. No argument reaches the gathering.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(original)
    def in_place(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero

        def with_padding(**options: Any) -> dict | None:
            state = gather(**options)
            return state and {key: _pad_buckets(self.buffers, key, value) for key, value in state.items()}

        self.get_parameter_state_dp_zero = with_padding
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    DistributedOptimizer.sharded_param_state_fully_reshardable = in_place


def _pad_buckets(buffers: list, index: int | str, by_dtype: Any) -> Any:
    """One entry of `get_parameter_state_dp_zero()` with its flat tensors as long as the buffer, padding included.

    Two buckets of 3 and 2 elements, each padded to 4:

        gathered     a b c d e
        the buffer   a b c . d e . .        a parameter's start counts the padding: d stands at 4, not at 3
    """
    if not isinstance(index, int):
        return by_dtype
    buffer = buffers[index]

    def pad(compact: Any) -> Any:
        if not isinstance(compact, torch.Tensor) or len(compact) == buffer.numel:
            return compact
        whole = compact.new_zeros(buffer.numel)
        for bucket, part in zip(
            buffer.buckets, compact.split([bucket.numel_unpadded for bucket in buffer.buckets]), strict=True
        ):
            whole[bucket.offset : bucket.offset + len(part)] = part
        return whole

    return {dtype: {name: pad(value) for name, value in tensors.items()} for dtype, tensors in by_dtype.items()}


def optimizer_crosses_expert_layouts() -> None:
    """0.19.2, core/optimizer/optimizer.py:1578: optimizer states can't go between EP1 and EP above 1.

    Above 1, experts have an optimizer of their own, and a checkpoint has the settings of its parameter groups (rates,
    steps) by optimizer: one set where two are expected, or the other way round, and the groups of experts are marked.
    Moments and master weights are by parameter and fit. No argument merges the optimizers.
    """
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    original = ChainedOptimizer.load_state_dict

    @functools.wraps(original)
    def load_state_dict(self: Any, state: dict[Any, Any]) -> None:
        count = len(self.chained_optimizers)
        saved = [state] if "optimizer" in state else [part for part in _numbered(state) if "optimizer" in part]
        if not saved or len(saved) == count or "param_state_sharding_type" not in saved[0]:
            original(self, state)
            return
        groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
        # First, so that a group with the right mark wins over a copy.
        other = [{**group, "is_expert_parallel": not group["is_expert_parallel"]} for group in groups]
        common = {**saved[0], "optimizer": {**saved[0]["optimizer"], "param_groups": other + groups}}
        loaded = [state] if count == 1 else _numbered(state)
        parts = [{**common, "param_state": part["param_state"]} for part in loaded]
        original(self, parts[0] if count == 1 else dict(enumerate(parts)))

    ChainedOptimizer.load_state_dict = load_state_dict


def _numbered(state: dict[Any, Any]) -> list[Any]:
    """The parts of a chained optimizer's state, in order."""
    return [state[key] for key in sorted(key for key in state if isinstance(key, int))]


def fsdp_starts_from_loaded_weights() -> None:
    """0.19.2, core/optimizer/distrib_optimizer.py:3080: Megatron-FSDP in 16 bit can't start from another checkpoint.

    Loading without the optimizer's state (`--finetune`, `--no-load-optim`, a release) ends in
    `reload_model_params()`, which raises. There is nothing to copy: an `fsdp_dtensor` checkpoint is read into the fp32
    weights themselves, and `MegatronFSDP.load_state_dict` brings them to the 16-bit ones. `load_checkpoint()` calls it
    in its middle, and no argument chooses the optimizer's class.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._copy_model_params_to_main_params

    @functools.wraps(original)
    def copy(self: Any, state_dict: dict[str, Any] | None = None) -> None:
        if not self.ddp_config.use_megatron_fsdp:
            original(self, state_dict)

    DistributedOptimizer._copy_model_params_to_main_params = copy


def first_loss_counts_once() -> None:
    """0.19.2, training/training.py:2608 (`training_log`): the second iteration's printed line has means of two.

    The first iteration after every start is printed at once, besides the regular ones of `--log-interval`, and so its
    sums are kept for the next line. With `--log-interval 1`, and whenever it is a regular one, it is then in two
    lines. TensorBoard's values are right. The loop calls the function by name.
    """
    from megatron.training import training
    from megatron.training.global_vars import get_args

    original = training.training_log

    @functools.wraps(original)
    def training_log(
        loss_dict: Any, total: Any, rate: Any, iteration: int, *args: Any, is_first_iteration: bool = False, **kw: Any
    ) -> Any:
        extra = is_first_iteration and iteration % get_args().log_interval != 0
        return original(loss_dict, total, rate, iteration, *args, is_first_iteration=extra, **kw)

    training.training_log = training_log


def nan_message_names_its_iteration() -> None:
    """0.19.2, core/rerun_state_machine.py:530: the error about NaN names the iteration after the one at fault.

    With `--rerun-mode disabled` the counter has gone on already when the step begins (:303), and the message adds one
    more. The check sits in the middle of the gradients' reduction; no argument words it.
    """
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    original = RerunStateMachine.validate_result

    @functools.wraps(original)
    def validate_result(self: Any, *args: Any, **kwargs: Any) -> None:
        ahead = int(self.mode == RerunMode.DISABLED)
        self.current_iteration -= ahead
        try:
            original(self, *args, **kwargs)
        finally:
            self.current_iteration += ahead

    RerunStateMachine.validate_result = validate_result


PATCHES: tuple[Callable[[], None], ...] = (
    dataset_helpers_come_compiled,
    gated_delta_net_takes_other_kernels,
    recomputation_without_transformer_engine,
    optimizer_resumes_fp32_parameters,
    optimizer_resumes_without_fused_adam,
    optimizer_saves_mixed_parameters,
    fused_aux_loss_takes_padding,
    fsdp_optimizer_states_agree,
    fsdp_checkpoint_without_16_bit_wrapper,
    fsdp_keeps_parameters_marks,
    optimizer_saves_buckets_in_place,
    optimizer_crosses_expert_layouts,
    fsdp_starts_from_loaded_weights,
    parameter_groups.optimizer_resumes_at_other_rates,
    first_loss_counts_once,
    nan_message_names_its_iteration,
)
