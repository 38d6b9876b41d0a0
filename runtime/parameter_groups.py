"""Which of a checkpoint's parameter groups is which of the optimizer's, whatever their learning rates are.

The rates don't identify a group here. Which of the two rates holds afterwards is the schedule's question, with the
schedule's answers: `--override-opt_param-scheduler` takes the command line's, `--use-checkpoint-opt_param-scheduler`
the checkpoint's, and without either a checkpoint with other rates is refused. A feature that gives some parameters
rates of their own gives their groups a `lr_mult` of their own too, by which they are then found.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from runtime.checkpoints import SCHEDULE_FIX

RATES = ("max_lr", "min_lr")

Group = dict[str, Any]


class GroupMismatch(ValueError):
    """A checkpoint's parameter groups don't fit this run's: which, and the fix."""


def rates(group: Group) -> tuple[Any, ...]:
    """Peak and lowest learning rate of a group, per step; None where it has none of its own."""
    return tuple(group.get(key) for key in RATES)


def with_rates(group: Group, of: Group) -> Group:
    """A copy of `group` with the rates of another."""
    return {**group, **{key: of[key] for key in RATES if key in of}}


def counterpart(group: Group, saved: Sequence[Group], keys: Sequence[str]) -> Group:
    """The saved group that is `group`, of the saved ones the last where several are equal.

    Args:
        group: of this run's optimizer.
        saved: the checkpoint's.
        keys: what identifies a group, the rates among it or not.

    Raises:
        GroupMismatch: none is, or several are that differ in their rates alone, none of which `group` has.
    """
    kind = [key for key in keys if key not in RATES]

    def identity(one: Group) -> list[Any]:
        # Megatron's own spelling in other frameworks; a missing key is None.
        return [one.get(key, one.get(f"pre_{key}")) for key in kind] + [bool(one.get("default_config", True))]

    same = [other for other in saved if identity(other) == identity(group)]
    exact = [other for other in same if rates(other) == rates(group)]
    if exact or len({rates(other) for other in same}) == 1:
        return (exact or same)[-1]
    described = dict(zip([*kind, "default_config"], identity(group), strict=True))
    found = f"{len(same)} that differ in their learning rates" if same else "none"
    raise GroupMismatch(f"the checkpoint has {found} of this run's group of parameters {described}")


def settle(loaded: Group, own: Group, saved: Group, *, override: bool, use_checkpoint: bool) -> None:
    """Give a loaded group the rates that hold from now on.

    Args:
        loaded: the optimizer's group, changed in place.
        own: the same before loading, with this command line's rates.
        saved: its counterpart in the checkpoint.
        override, use_checkpoint: the two switches of the schedule.

    Raises:
        GroupMismatch: the rates differ, and neither switch says which to take.
    """
    if rates(saved) != rates(own) and not (override or use_checkpoint):
        asked, was = (", ".join(f"{key} {group.get(key)}" for key in RATES) for group in (own, saved))
        raise GroupMismatch(
            f"the checkpoint was made at other learning rates ({was}) than this run's ({asked}). {SCHEDULE_FIX}"
        )
    loaded.update(with_rates({}, saved if use_checkpoint else own))


def optimizer_resumes_at_other_rates() -> None:
    """0.19.2, core/optimizer/optimizer.py:139: no run can go on at another learning rate.

    A checkpoint's parameter groups are looked up by everything that they say, `--lr` and `--min-lr` among it: other
    ones end in a KeyError (core/optimizer/distrib_optimizer.py:970, optimizer.py:642), whatever the switches of the
    schedule say. Megatron-FSDP finds the groups by their parameters and takes the checkpoint's rates, whatever they
    say. Groups are matched in the middle of loading; no argument reaches that.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import MegatronOptimizer, param_group_identifier_keys

    original_load = DistributedOptimizer.load_state_dict
    original_match = MegatronOptimizer._filter_and_reorder_param_groups

    @functools.wraps(original_load)
    def load_state_dict(self: Any, state: dict[str, Any]) -> None:
        own = [dict(group) for group in self.optimizer.param_groups]
        if self.ddp_config.use_megatron_fsdp:
            original_load(self, state)
            saved = [dict(group) for group in self.optimizer.param_groups]
        else:
            there = state["optimizer"]["param_groups"]
            saved = [counterpart(group, there, param_group_identifier_keys) for group in own]
            matching = [with_rates(group, mine) for group, mine in zip(saved, own, strict=True)]
            original_load(self, {**state, "optimizer": {**state["optimizer"], "param_groups": matching}})
        for loaded, mine, theirs in zip(self.optimizer.param_groups, own, saved, strict=True):
            settle(loaded, mine, theirs, **_schedule_switches())

    @functools.wraps(original_match)
    def match(current: list[dict], there: list[dict]) -> list[dict]:
        saved = [counterpart(group, there, param_group_identifier_keys) for group in current]
        matching = [with_rates(group, mine) for group, mine in zip(saved, current, strict=True)]
        # The original puts the parameters by the groups' places in the checkpoint.
        for group, place in zip(matching, there, strict=True):
            group["params"] = place["params"]
        for group, mine, theirs in zip(matching, current, saved, strict=True):
            settle(group, mine, theirs, **_schedule_switches())
        return matching

    DistributedOptimizer.load_state_dict = load_state_dict
    MegatronOptimizer._filter_and_reorder_param_groups = staticmethod(match)


def _schedule_switches() -> dict[str, bool]:
    from megatron.training.global_vars import get_args

    args = get_args()
    return {"override": args.override_opt_param_scheduler, "use_checkpoint": args.use_checkpoint_opt_param_scheduler}
