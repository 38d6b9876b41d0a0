"""The patches of megatron-core: each defect is still there, and is gone once patched.

A test named `..._is_still_broken` that fails says that the installed megatron-core has repaired the defect: delete the
patch. They run megatron-core's modules as they come, loaded a second time besides the patched ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from runtime import patches, prepare
from tests.pristine import pristine


@pytest.fixture(scope="module", autouse=True)
def patched() -> None:
    prepare()


def test_applying_again_changes_nothing() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    before = DistributedOptimizer.load_state_dict
    patches.apply()
    assert DistributedOptimizer.load_state_dict is before


def test_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "MINOR", 20)
    with pytest.raises(patches.UnknownMegatronVersion, match=r"0\.19\.2.*dataset_helpers_come_compiled.*KNOWN_VERSION"):
        patches.apply()


def test_every_patch_says_where_the_defect_is() -> None:
    for patch in patches.PATCHES:
        version, where, _ = patch.__doc__.split(maxsplit=2)
        assert version == "0.19.2," and ".py:" in where, patch.__name__


class TestDatasetHelpers:
    NAME = "megatron.core.datasets.utils"

    def test_compile_helpers_is_still_broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        commands: list[list[str]] = []

        def run(command: list[str]) -> SimpleNamespace:
            commands.append(command)
            return SimpleNamespace(returncode=2)

        monkeypatch.setattr(subprocess, "run", run)
        with pytest.raises(SystemExit):
            pristine(self.NAME).compile_helpers()
        make, option, folder = commands[0]
        assert (make, option) == ("make", "-C")
        assert not list(Path(folder).glob("[Mm]akefile"))

    def test_patched(self) -> None:
        importlib.import_module(self.NAME).compile_helpers()


class TestGatedDeltaNet:
    NAME = "megatron.core.ssm.gated_delta_net.common"

    @pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="flash-linear-attention is installed")
    def test_constructor_is_still_broken(self) -> None:
        with pytest.raises(ImportError, match="FLA is not installed"):
            pristine(self.NAME)._GDNBase(config=None, submodules=None)

    def test_patched(self) -> None:
        # Past the check: what raises now is the missing process group.
        with pytest.raises(AssertionError, match="pg_collection"):
            importlib.import_module(self.NAME)._GDNBase(config=None, submodules=None)


class TestRecomputation:
    NAME = "megatron.core.tensor_parallel.random"

    def test_default_is_still_broken(self) -> None:
        assert pristine(self.NAME).CheckpointWithoutOutput().fp8 is True

    def test_patched(self, single_rank: None) -> None:
        checkpoint = importlib.import_module(self.NAME).CheckpointWithoutOutput()
        assert checkpoint.fp8 is False
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        squared = checkpoint.checkpoint(lambda x: x**2, x)
        result = squared**2
        checkpoint.discard_output_and_register_recompute(result)
        assert squared.untyped_storage().size() == 0
        result.sum().backward()
        assert x.grad.tolist() == [4.0, 32.0]


class Shard:
    """As much of a DistributedOptimizer as loading touches: fp32 parameters, all of them on this rank."""

    def __init__(self, optimizer_class: type, parameters: int, *, stepped: bool) -> None:
        self.optimizer_class = optimizer_class
        self.parameters = [nn.Parameter(torch.full((3,), float(i))) for i in range(parameters)]
        # The main copy of an fp32 parameter is a view of it.
        self.main = [nn.Parameter(torch.empty(0)) for _ in self.parameters]
        for main, parameter in zip(self.main, self.parameters, strict=True):
            main.data = parameter.data
        self.optimizer = torch.optim.AdamW(self.main)
        if stepped:
            for main in self.main:
                main.grad = torch.ones(3)
            self.optimizer.step()
        self.grad_scaler = None
        self.config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, fp16=False)
        self.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
        self.model_param_group_index_map = {p: (0, i) for i, p in enumerate(self.parameters)}
        self.gbuf_ranges = [{torch.float32: [{"param_map": dict.fromkeys(self.parameters)}]}]

    def init_state_fn(self, optimizer: torch.optim.Optimizer, config: object) -> None:
        for main in self.main:
            optimizer.state[main] = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}

    def state_dict(self) -> dict:
        return self.optimizer_class.state_dict(self)

    def load_state_dict(self, state: dict) -> None:
        self.optimizer_class.load_state_dict(self, state)

    def set(self, index: int, **tensors: Tensor) -> None:
        self.optimizer_class._set_main_param_and_optimizer_states(self, self.parameters[index], tensors)

    def steps(self) -> list[float]:
        return [state["step"].item() for state in self.optimizer.state.values()]

    def step(self) -> None:
        for main in self.main:
            main.grad = torch.ones(3)
        self.optimizer.step()


DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"


@pytest.fixture(scope="module")
def broken_class() -> type:
    return pristine(DISTRIBUTED_OPTIMIZER).DistributedOptimizer


@pytest.fixture(scope="module")
def mended_class() -> type:
    return importlib.import_module(DISTRIBUTED_OPTIMIZER).DistributedOptimizer


class TestResumingFp32Parameters:
    @staticmethod
    def gradients_recorded(optimizer_class: type) -> bool:
        seen: list[bool] = []
        shard = Shard(optimizer_class, 1, stepped=True)
        shard._set_main_param_and_optimizer_states = lambda *_: seen.append(torch.is_grad_enabled())
        shard.per_bucket_numel_unpadded = [[3]]
        state = {"per_bucket_numel_unpadded": [[3]], 0: {torch.float32: [[{"padding": False}]]}}
        optimizer_class.load_parameter_state_from_dp_reshardable(shard, state)
        return seen == [True]

    def test_dp_reshardable_is_still_broken(self, broken_class: type) -> None:
        assert self.gradients_recorded(broken_class)

    def test_patched(self, mended_class: type) -> None:
        assert not self.gradients_recorded(mended_class)


def _has_fused_adam() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in ("transformer_engine", "apex"))


@pytest.mark.skipif(_has_fused_adam(), reason="the distributed optimizer uses a fused Adam")
class TestResumingWithoutFusedAdam:
    LOADED: ClassVar = {name: torch.rand(3) for name in ("param", "exp_avg", "exp_avg_sq")}

    def test_state_before_the_first_step_is_still_broken(self, broken_class: type) -> None:
        with pytest.raises(AssertionError):
            Shard(broken_class, 2, stepped=False).state_dict()

    def test_state_before_the_first_step_mended(self, mended_class: type) -> None:
        state = Shard(mended_class, 2, stepped=False).state_dict()
        assert [group["step"] for group in state["optimizer"]["param_groups"]] == [0.0]

    @staticmethod
    def steps_after_loading_5(optimizer_class: type) -> list[float]:
        shard = Shard(optimizer_class, 3, stepped=True)
        state = shard.state_dict()
        state["optimizer"]["param_groups"][0]["step"] = 5.0
        shard.load_state_dict(state)
        shard.step()
        return shard.steps()

    def test_common_step_is_still_broken(self, broken_class: type) -> None:
        assert self.steps_after_loading_5(broken_class) == [8.0, 8.0, 8.0]

    def test_common_step_mended(self, mended_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron.training import global_vars

        switches = {"override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False}
        monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", SimpleNamespace(**switches))
        assert self.steps_after_loading_5(mended_class) == [6.0, 6.0, 6.0]

    def test_missing_step_is_still_broken(self, broken_class: type) -> None:
        with torch.no_grad(), pytest.raises(KeyError, match="step"):
            Shard(broken_class, 1, stepped=True).set(0, **self.LOADED)

    def test_stale_step_is_still_broken(self, broken_class: type) -> None:
        shard = Shard(broken_class, 1, stepped=True)
        with torch.no_grad():
            shard.set(0, **self.LOADED, step=torch.tensor(0.0))
        assert shard.steps() == [0.0]

    @pytest.mark.parametrize("stale", [{}, {"step": torch.tensor(0.0)}])
    def test_step_mended(self, mended_class: type, stale: dict[str, Tensor]) -> None:
        shard = Shard(mended_class, 1, stepped=True)
        with torch.no_grad():
            shard.set(0, **self.LOADED, **stale)
        assert shard.steps() == [1.0]
        assert torch.equal(shard.parameters[0], self.LOADED["param"])
        assert torch.equal(shard.optimizer.state[shard.main[0]]["exp_avg"], self.LOADED["exp_avg"])


class TestFusedAuxLoss:
    @staticmethod
    def counts(function: object) -> tuple[Tensor, Tensor]:
        routing_map = torch.tensor([[True, True, False], [False, True, True], [False, False, False]])
        _, local, total = function(routing_map, torch.distributed.group.WORLD, topk=2, with_padding_mask=True)
        return local, total

    def test_count_with_padding_is_still_broken(self, single_rank: None) -> None:
        local, total = self.counts(
            pristine("megatron.core.transformer.moe.moe_utils").get_tokens_per_expert_and_token_count
        )
        assert local.is_floating_point() and total.is_floating_point()

    def test_patched(self, single_rank: None) -> None:
        from megatron.core.transformer.moe import router

        for count in self.counts(router.get_tokens_per_expert_and_token_count):
            assert count.dtype == torch.int64 and count.item() == 2


class TestFSDPOptimizerStates:
    """A parameter without gradient, as a rank with an empty share has it, still has a state, in its place."""

    @staticmethod
    def saved(optimizer_class: type) -> dict[str, dict[str, Tensor]]:
        empty, held = nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([empty, held])

        def step() -> None:
            held.grad = torch.ones(2)
            optimizer.step()

        def init_state(inner: torch.optim.Optimizer, config: object) -> None:
            for parameter in (empty, held):
                if not inner.state[parameter]:
                    inner.state[parameter] = {"exp_avg": torch.zeros_like(parameter)}

        names = {empty: "empty", held: "held"}
        stand_in = SimpleNamespace(
            optimizer=optimizer,
            state=optimizer.state,
            config=None,
            init_state_fn=init_state,
            ddp_config=SimpleNamespace(use_megatron_fsdp=True),
            _param_name=names.get,
            _param_groups_to_param2group_meta=lambda groups: {},
        )
        step()
        optimizer_class.sharded_param_state_fsdp_dtensor(stand_in)
        step()
        return optimizer_class.sharded_param_state_fsdp_dtensor(stand_in)["state"]

    def test_is_still_broken(self, broken_class: type) -> None:
        assert list(self.saved(broken_class)) == ["held"]

    def test_patched(self, mended_class: type) -> None:
        states = self.saved(mended_class)
        assert list(states) == ["empty", "held"]
        assert states["empty"]["step"] == states["held"]["step"] == 2
        assert states["empty"]["step"] is not states["held"]["step"]


class TestFSDPCheckpointNames:
    """Both run into the parameter, which has no share here; the broken one doesn't find it."""

    @staticmethod
    def save(function: object) -> None:
        inner = nn.ModuleDict({"mlp": nn.ModuleDict({"linear_fc1": nn.Linear(2, 2, bias=False)})})
        model = nn.ModuleDict({"module": nn.ModuleDict({"decoder": inner})})
        model.config = None
        function(model, {"module.decoder.mlp.linear_fc1.weight": torch.zeros(2, 2)}, None)

    def test_is_still_broken(self) -> None:
        with pytest.raises(AttributeError, match="has no attribute `module`"):
            self.save(pristine("megatron.core.transformer.fsdp_dtensor_checkpoint").handle_swiglu_in_state_dict)

    def test_patched(self) -> None:
        from megatron.training import checkpointing

        with pytest.raises(AttributeError, match="megatron_fsdp_slice"):
            self.save(checkpointing.handle_swiglu_in_state_dict)


class TestFSDPMarks:
    @staticmethod
    def marked(function: object) -> nn.Parameter:
        old, new = nn.Parameter(torch.empty(2, device="meta")), nn.Parameter(torch.empty(2))
        old.allreduce, old.sequence_parallel, new.sequence_parallel = False, True, False
        buffer = SimpleNamespace(
            param_to_name={old: "weight"},
            param_to_param_group={old: 0},
            param_to_direct_module={old: None},
            params=[old],
            parameter_groups=[],
        )
        function(buffer, [old], [new])
        return new

    NAME = "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer"

    def test_is_still_broken(self) -> None:
        assert not hasattr(self.marked(pristine(self.NAME).ParamAndGradBuffer._reset_parameters), "allreduce")

    def test_patched(self) -> None:
        """What the module itself has set when it initialised the parameter stays."""
        new = self.marked(importlib.import_module(self.NAME).ParamAndGradBuffer._reset_parameters)
        assert new.allreduce is False and new.sequence_parallel is False


class TestMixedParameters:
    """A group's fp32 parameters come first, as the optimizer puts them."""

    @staticmethod
    def places(optimizer_class: type) -> list[tuple[int, int]]:
        narrow, wide = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(2))
        buffers = [{"bf16": [{"param_map": {narrow: None}}], "fp32": [{"param_map": {wide: None}}]}]
        found, groups = optimizer_class._build_optimizer_group_ranges([{"params": [narrow, wide]}], buffers)
        assert [found[parameter] for parameter in groups[0]["params"]] == [(0, 0), (0, 1)]
        return [found[narrow], found[wide]]

    def test_is_still_broken(self, broken_class: type) -> None:
        assert self.places(broken_class) == [(0, 0), (0, 1)]

    def test_is_mended(self, mended_class: type) -> None:
        assert self.places(mended_class) == [(0, 1), (0, 0)]


class TestBucketsInPlace:
    """A parameter of 2 elements in a bucket padded to 4, then one of 3 in the next bucket."""

    @staticmethod
    def saved(optimizer_class: type) -> list[list[float]]:
        from megatron.core.dist_checkpointing import ShardedTensor

        first, second = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0, 4.0, 5.0]))
        optimizer = object.__new__(optimizer_class)
        buckets = [SimpleNamespace(offset=0, numel_unpadded=2), SimpleNamespace(offset=4, numel_unpadded=3)]
        places = {first: (0, 2, 0), second: (4, 7, 1)}
        optimizer.buffers = [SimpleNamespace(numel=8, numel_unpadded=5, buckets=buckets, param_index_map=places)]
        optimizer.gbuf_ranges = [{torch.float32: []}]
        gathered = {"param": torch.arange(1.0, 6.0), "numel_unpadded": 5}
        optimizer.get_parameter_state_dp_zero = lambda **_: {"buckets_coalesced": True, 0: {torch.float32: gathered}}
        model = {str(len(p)): ShardedTensor.from_rank_offsets(str(len(p)), p, replica_id=0) for p in places}
        state = optimizer.sharded_param_state_fully_reshardable(model, metadata={})
        return [state[index]["param"].data.tolist() for index in (0, 1)]

    def test_is_still_broken(self, broken_class: type, single_rank: None) -> None:
        assert self.saved(broken_class) != [[1.0, 2.0], [3.0, 4.0, 5.0]]

    def test_patched(self, mended_class: type, single_rank: None) -> None:
        assert self.saved(mended_class) == [[1.0, 2.0], [3.0, 4.0, 5.0]]


class TestExpertLayouts:
    """Settings saved by one optimizer and loaded by two, and the other way round."""

    NAME = "megatron.core.optimizer.optimizer"

    @staticmethod
    def state(*experts: bool) -> dict:
        groups = [{"is_expert_parallel": mark, "step": 7.0} for mark in experts]
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}

    @staticmethod
    def loaded(chained_class: type, count: int, state: dict) -> list[dict]:
        got: list[dict] = []
        chained = object.__new__(chained_class)
        chained.chained_optimizers = [SimpleNamespace(load_state_dict=got.append) for _ in range(count)]
        chained._synchronize_steps = lambda: None
        chained.load_state_dict(state)
        return got

    def one_to_two(self, chained_class: type) -> list[dict]:
        return self.loaded(chained_class, 2, {**self.state(False), 0: {"param_state": "a"}, 1: {"param_state": "b"}})

    def two_to_one(self, chained_class: type) -> list[dict]:
        return self.loaded(chained_class, 1, {0: self.state(False), 1: self.state(True), "param_state": "a"})

    def test_one_to_two_is_still_broken(self) -> None:
        with pytest.raises((RuntimeError, TypeError)):
            self.one_to_two(pristine(self.NAME).ChainedOptimizer)

    def test_two_to_one_is_still_broken(self) -> None:
        (state,) = self.two_to_one(pristine(self.NAME).ChainedOptimizer)
        assert "optimizer" not in state

    def test_patched(self) -> None:
        chained_class = importlib.import_module(self.NAME).ChainedOptimizer
        dense, experts = self.one_to_two(chained_class)
        assert (dense["param_state"], experts["param_state"]) == ("a", "b")
        (together,) = self.two_to_one(chained_class)
        assert together["param_state"] == "a"
        for state in (dense, experts, together):
            groups = state["optimizer"]["param_groups"]
            assert {group["is_expert_parallel"]: group["step"] for group in groups} == {False: 7.0, True: 7.0}


class TestFsdpStartsFromLoadedWeights:
    NAME = "megatron.core.optimizer.distrib_optimizer"
    OPTIMIZER = SimpleNamespace(optimizer=None, ddp_config=SimpleNamespace(use_megatron_fsdp=True))

    def test_is_still_broken(self) -> None:
        with pytest.raises(NotImplementedError, match="model-to-main parameter update"):
            pristine(self.NAME).DistributedOptimizer._copy_model_params_to_main_params(self.OPTIMIZER)

    def test_patched(self) -> None:
        importlib.import_module(self.NAME).DistributedOptimizer._copy_model_params_to_main_params(self.OPTIMIZER)


class TestOtherRates:
    """A checkpoint's groups are found at other learning rates, and the schedule's switches say which rates hold."""

    NAME = "megatron.core.optimizer.optimizer"

    @staticmethod
    def group(rate: float, decay: float, **more: object) -> dict:
        return {"max_lr": rate, "min_lr": rate / 10, "wd_mult": decay, "default_config": True, "params": [0], **more}

    def matched(self, optimizer_class: type, current: list[dict], saved: list[dict]) -> list[dict]:
        return optimizer_class._filter_and_reorder_param_groups(current, saved)

    @pytest.fixture
    def switches(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        switches = SimpleNamespace(override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False)
        monkeypatch.setattr("megatron.training.global_vars._GLOBAL_ARGS", switches)
        return switches

    def test_is_still_broken(self) -> None:
        with pytest.raises(ValueError, match="Could not find parameter group with key"):
            self.matched(pristine(self.NAME).MegatronOptimizer, [self.group(0.5, 1)], [self.group(0.1, 1)])

    def test_patched(self, switches: SimpleNamespace) -> None:
        mine = [self.group(0.5, 1, params=[0]), self.group(0.5, 0, params=[1])]
        theirs = [self.group(0.1, 0, step=7, params=[2]), self.group(0.1, 1, step=8, params=[3])]
        optimizer_class = importlib.import_module(self.NAME).MegatronOptimizer
        switches.override_opt_param_scheduler = True
        assert self.matched(optimizer_class, mine, theirs) == [
            self.group(0.5, 1, step=8, params=[2]),
            self.group(0.5, 0, step=7, params=[3]),
        ]
        switches.override_opt_param_scheduler, switches.use_checkpoint_opt_param_scheduler = False, True
        assert [group["max_lr"] for group in self.matched(optimizer_class, mine, theirs)] == [0.1, 0.1]

    def test_other_rates_need_a_switch(self, switches: SimpleNamespace) -> None:
        optimizer_class = importlib.import_module(self.NAME).MegatronOptimizer
        with pytest.raises(ValueError, match=r"max_lr 0.1, min_lr .*CKPT_OVERRIDE_SCHEDULER=1"):
            self.matched(optimizer_class, [self.group(0.5, 1)], [self.group(0.1, 1)])

    def test_groups_that_differ_in_their_rates_alone(self, switches: SimpleNamespace) -> None:
        """The equal one is found; with none, it can't be told which is which."""
        optimizer_class = importlib.import_module(self.NAME).MegatronOptimizer
        theirs = [self.group(0.1, 1, step=7), self.group(0.2, 1, step=8)]
        mine = [self.group(0.2, 1), self.group(0.1, 1)]
        assert [group["step"] for group in self.matched(optimizer_class, mine, theirs)] == [8, 7]
        with pytest.raises(ValueError, match="2 that differ in their learning rates"):
            self.matched(optimizer_class, [self.group(0.5, 1), self.group(0.6, 1)], theirs)


class TestFirstLoss:
    """A line in the log for each iteration, whose sums start anew after each."""

    @staticmethod
    def flags(monkeypatch: pytest.MonkeyPatch, interval: int) -> list[bool]:
        """`is_first_iteration` as Megatron's own function gets it, for the iterations 1, 2 and 3."""
        from megatron.training import training

        got: list[bool] = []
        with monkeypatch.context() as context:
            context.setattr("megatron.training.global_vars._GLOBAL_ARGS", SimpleNamespace(log_interval=interval))
            context.setattr(
                training, "training_log", lambda *_, is_first_iteration, **__: got.append(is_first_iteration)
            )
            patches.first_loss_counts_once()
            for iteration in (1, 2, 3):
                training.training_log({}, {}, 0.1, iteration, is_first_iteration=iteration == 1)
        return got

    def test_is_still_broken(self) -> None:
        source = inspect.getsource(pristine("megatron.training.training").training_log)
        assert "should_reset = not is_first_iteration" in source

    def test_patched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.flags(monkeypatch, 1) == [False, False, False]
        assert self.flags(monkeypatch, 2) == [True, False, False]


class TestNanMessage:
    def said(self, validate: Callable[..., None]) -> str:
        """The error about the fifth step's gradients."""
        from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

        machine = RerunStateMachine(mode=RerunMode.DISABLED)
        machine.current_iteration = 4  # as training/training.py:3512 sets it: steps done
        assert machine.should_run_forward_backward(None)
        with pytest.raises(RuntimeError) as found:
            validate(machine, torch.tensor(torch.nan), torch.isnan, "found NaN")
        return str(found.value)

    def test_defect_is_there(self) -> None:
        from megatron.core.rerun_state_machine import RerunStateMachine

        patches.apply()
        assert "iteration 6: Unexpected result nan" in self.said(RerunStateMachine.validate_result.__wrapped__)

    def test_patched(self) -> None:
        from megatron.core.rerun_state_machine import RerunStateMachine

        patches.apply()
        assert "iteration 5: Unexpected result nan" in self.said(RerunStateMachine.validate_result)
