"""What DeepSpeed does around a step that leads to nothing, left out; the bits are the same."""

from typing import Any


def leave_out_what_is_idle(deepspeed: Any, stage: int) -> None:
    """Have an engine of stage 0 clip and clear the gradients of what trains, and no others, and
    add up gradients only where it is called to. Other stages stay as they are.

    By itself it walks all modules three times a step, which in a small model takes as long as a
    layer, and copies the gradients of one rank into a buffer and back. The order is that of its
    own walk, so that norms are added up to the same bits.
    """
    if stage:
        return
    from deepspeed.runtime.utils import clip_grad_norm_

    trained = [own for own in deepspeed.module.parameters() if own.requires_grad]

    def clip() -> None:
        clip_grad_norm_(trained, deepspeed.gradient_clipping(), mpu=deepspeed.mpu)

    def clear() -> None:
        for parameter in trained:
            parameter.grad = None

    deepspeed.clip_fp32_gradients, deepspeed.zero_grad = clip, clear
    deepspeed.enable_backward_allreduce = False
