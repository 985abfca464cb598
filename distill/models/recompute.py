"""Gradient checkpointing of timm's networks: activations are computed again in the backward pass,
to save memory; gradients stay the same.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from contract.errors import UserError


def recompute_in_backward(net: nn.Module, name: str) -> None:
    """Turn gradient checkpointing of a timm network on; raises UserError where it has none."""
    try:
        net.set_grad_checkpointing(True)
        supported = any(getattr(part, "grad_checkpointing", False) for part in net.modules())
    except (AssertionError, AttributeError, NotImplementedError, TypeError):
        supported = False
    if not supported:
        raise UserError(
            f"student '{name}' does not support gradient checkpointing: set "
            "student.grad_checkpointing=false (train.accumulate saves memory too)"
        )
    for part in net.modules():
        if isinstance(part, _BatchNorm) and part.track_running_stats:
            part.register_forward_pre_hook(partial(_keep_statistics, part.momentum))


def _keep_statistics(momentum: float | None, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Let the running statistics follow in the forward pass alone: in the backward pass the same
    pictures come by a second time.
    """
    # torch.utils.checkpoint asks in the same way whether a backward pass is under way
    again = torch._C._current_graph_task_id() != -1
    # not by turning the statistics off: a pass that keeps other tensors than the first is refused
    norm.momentum = 0.0 if again else momentum
    if again and norm.training:
        norm.num_batches_tracked -= 1
