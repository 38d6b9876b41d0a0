"""`--lr-mult`: parameters whose learning rates are a multiple of the others'."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from models import ModelConfig, ModelSpec
from models.trained import frozen_names, rate_factors
from runtime.model_builder import unwrapped


class LearningRates:
    """Tells Megatron's optimizer which parameters learn at another rate.

    megatron-core's optimizer takes overrides by parameter, but `pretrain()` asks `get_megatron_optimizer_config(args)`
    for them and takes no argument (0.19.2, training/training.py:2117), so `attach` puts itself around that function.
    """

    def __init__(self, args: Namespace, spec: ModelSpec[Any], config: ModelConfig) -> None:
        self._args, self._spec, self._config = args, spec, config
        # By factor, since Megatron makes one group of parameters of each.
        self._parameters: dict[float, set[int]] = defaultdict(set)

    def attach(self, chunks: list[nn.Module]) -> list[nn.Module]:
        """Find the wrapped model's parameters; a hook after wrapping."""
        if not self._args.lr_mult:
            return chunks
        from megatron.training import training

        factors = self._factors()
        for chunk in chunks:
            for name, parameter in self._spec.table.parameters(self._config, unwrapped(chunk)):
                if name in factors:
                    self._parameters[factors[name]].add(id(parameter))
        original = training.get_megatron_optimizer_config

        def with_factors(args: Any) -> tuple[Any, dict[Any, Any]]:
            config, overrides = original(args)
            return config, {**overrides, **self._overrides(config)}

        training.get_megatron_optimizer_config = with_factors
        return chunks

    def _factors(self) -> Mapping[str, float]:
        weights, mapping = self._spec.table, self._spec.table.mapping(self._config, ())
        frozen = frozen_names(mapping, weights.groups, self._args.freeze or ())
        return rate_factors(mapping, weights.groups, self._args.lr_mult, frozen)

    def _overrides(self, config: Any) -> dict[Any, Any]:
        from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

        overrides = {}
        for factor, known in self._parameters.items():
            predicate = ParamPredicate(f"lr_mult_{factor}", lambda parameter, known=known: id(parameter) in known)
            rates = {"max_lr": factor * config.lr, "min_lr": factor * (config.min_lr or 0.0)}
            overrides[ParamKey(predicate=predicate)] = rates
        return overrides
