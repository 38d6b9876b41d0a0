"""Forward and backward of a model as two CUDA graphs: the host launches two things instead of thousands of kernels.

What a graph does is fixed when it is captured: shapes, numbers of the host, addresses. So inputs are copied into
buffers of its own, and gradients are added to the parameters' `main_grad`, which stay where they are, inside the
backward graph: Megatron's hooks, which would do it, never run.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Other threads (NCCL's watchdog, the loader's pinning) go on with calls that a capture forbids its own thread.
_ERRORS = "thread_local"


class GraphedFunction:
    """A function of tensors that need no gradient, and of parameters that do.

    Capturing runs nothing: what the function does on the host alone happens once, now. The function must have run
    before with such inputs, so that everything that is made at a first call (compiled kernels, workspaces) exists.

    Args:
        function: named tensors -> [...], differentiable in the parameters.
        inputs: what they look like.
        parameters: those that need a gradient; each has `main_grad`.
        pool: memory that it shares with other graphs, which mustn't be between forward and backward at the same time.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor]], Tensor],
        inputs: Mapping[str, Tensor],
        parameters: Iterable[nn.Parameter],
        pool: Any,
    ) -> None:
        parameters = list(parameters)
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        # Differentiable, so that autograd calls back: the inputs aren't.
        self._anchor = torch.zeros((), device=next(iter(inputs.values())).device, requires_grad=True)
        self._waiting = False
        # What eager passes have cached would else stay beside the graphs' own memory.
        gc.collect()
        torch.cuda.empty_cache()
        self._forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._forward, pool=pool, capture_error_mode=_ERRORS):
            self._output = function(self._inputs)
        self._output_grad = torch.zeros_like(self._output)
        for parameter in parameters:
            vars(parameter)["grad_added_to_main_grad"] = False
        self._backward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._backward, pool=pool, capture_error_mode=_ERRORS):
            gradients = torch.autograd.grad(self._output, parameters, self._output_grad, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                _add_to_main_grad(parameter, gradient)
        self._output = self._output.detach()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The function's output for other values of the same shapes; overwritten by the next call.

        Raises:
            RuntimeError: the last output's backward hasn't run: its activations would be overwritten.
        """
        if self._waiting:
            raise RuntimeError("a graph's forward was called again before its backward")
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        return _Replay.apply(self._anchor, self)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, graphed: GraphedFunction) -> Tensor:
        graphed._forward.replay()
        graphed._waiting = True
        ctx.graphed = graphed
        return graphed._output.detach()

    @staticmethod
    def backward(ctx: Any, output_grad: Tensor) -> tuple[None, None]:
        graphed = ctx.graphed
        graphed._output_grad.copy_(output_grad)
        graphed._backward.replay()
        graphed._waiting = False
        return None, None


def _add_to_main_grad(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    """What the hook of Megatron's DDP does with a gradient."""
    marks = vars(parameter)  # Megatron's own
    added = marks["grad_added_to_main_grad"] and not getattr(parameter, "zero_out_wgrad", False)
    if gradient is not None and not added:
        marks["main_grad"].add_(gradient)
