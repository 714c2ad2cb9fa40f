"""What DeepSpeed does around a step that leads to nothing, left out."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def leave_out_what_is_idle(deepspeed: Any, stage: int, ranks: int) -> None:
    """Spare an engine of stage 0, 1 or 2 its work for each parameter where work for all of them at
    once, or none, does the same. Stage 3, optimizers on the CPU,
    and those that keep a sum of gradients in fp32 beside bf16, stay as they are.

    ranks: of the client.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = deepspeed.optimizer
    if stage == 0:
        _replicated(deepspeed)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        _partitioned(optimizer, ranks)


def _replicated(deepspeed: Any) -> None:
    """Clip and clear the gradients of what trains, and no others, and add up gradients only when
    called to; the bits are the same.

    By itself it walks all modules three times a step, which in a small model takes as long as a
    layer, and copies the gradients of one rank into a buffer and back. The order is that of its
    own walk, so that norms are added up to the same bits.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    trained = [own for own in deepspeed.module.parameters() if own.requires_grad]

    def clip() -> None:
        clip_grad_norm_(trained, deepspeed.gradient_clipping(), mpu=deepspeed.mpu)

    def clear() -> None:
        for parameter in trained:
            parameter.grad = None

    deepspeed.clip_fp32_gradients, deepspeed.zero_grad = clip, clear
    deepspeed.enable_backward_allreduce = False


def _partitioned(optimizer: Any, ranks: int) -> None:
    """One norm over all gradients, not one each; no reading of a bf16 step's numbers on the host,
    which would wait for the device; and no buckets for the gradients of a single rank.

    On an H100 these take a third of a step of a 1B model with LoRA on all linear layers
    (benchmarks/README.md). A gradient that is not finite is told by `invalid`, after the step.
    """
    from deepspeed import comm
    from deepspeed.runtime.utils import mask_nan_or_inf_with_val_inplace

    # The norm tells as much. In fp32 it is off by itself.
    optimizer.check_grad_overflow = False

    def norm(gradients: Sequence[torch.Tensor], params: Any, norm_type: int = 2) -> torch.Tensor:
        flat = torch.cat([own.detach().flatten() for own in gradients])
        square = torch.linalg.vector_norm(flat, dtype=torch.float64).square().float()
        comm.all_reduce(square, group=optimizer.dp_process_group)
        total = square.sqrt()
        mask_nan_or_inf_with_val_inplace(total, device=optimizer.device)
        return total

    def clip(groups: Iterable[torch.Tensor], total: torch.Tensor) -> None:
        if optimizer.clip_grad > 0:
            # DeepSpeed's own formula. Where the norm is -1, values are lost anyway.
            factor = 1 / ((total + 1e-6) / optimizer.clip_grad).clamp(min=1.0)
            for gradient in groups:
                gradient.data.mul_(factor)

    optimizer.get_grad_norm_direct, optimizer.unscale_and_clip_grads = norm, clip
    # Parameters are parts of what the step has written already.
    optimizer._update_model_bit16_weights = _nothing
    # Gradients that are added up in another type go through a buffer that buckets fill.
    groups = range(len(optimizer.bit16_groups))
    if ranks == 1 and not any(map(optimizer._use_compact_grad_partition_buffer, groups)):
        optimizer.reduce_ready_partitions_and_remove_grads = _nothing
        optimizer.reduce_ipg_grads = _nothing


def _nothing(*args: Any, **options: Any) -> None:
    """What is where it belongs stays there."""


def invalid(deepspeed: Any, device: torch.device) -> torch.Tensor:
    """() bool on the device: whether the gradient of the last step was not finite."""
    norm = getattr(deepspeed.optimizer, "_global_grad_norm", None)
    return norm < 0 if torch.is_tensor(norm) else torch.zeros((), dtype=torch.bool, device=device)
