"""Out of a DeepSpeed step that was left in the middle."""

from typing import Any

import torch
from torch import nn


def recover(deepspeed: Any, stage: int, model: nn.Module, device: torch.device) -> None:
    """Forget what is half reduced, counted or gathered. Values and optimizer state are spoiled."""
    if stage == 0:
        deepspeed.zero_grad()
        return
    optimizer = deepspeed.optimizer
    if stage > 1:
        optimizer.overlapping_partition_gradients_reduce_epilogue()
    else:
        optimizer.reduce_gradients()
    optimizer.exit_backward()
    if stage == 3:
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        coordinator.release_and_reset_all(model)
        coordinator.reset_step()
    discard(deepspeed, device)


def discard(deepspeed: Any, device: torch.device) -> None:
    """Clear gradients that micro-steps left: finish the step with a zero loss, which spoils values
    and optimizer state."""
    deepspeed.set_gradient_accumulation_boundary(True)
    ids = torch.ones((1, 4), dtype=torch.int64, device=device)
    zero = deepspeed(input_ids=ids, attention_mask=ids).float().sum() * 0.0
    deepspeed.backward(zero, scale_wrt_gas=False)
    deepspeed.step()
