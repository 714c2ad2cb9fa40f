"""What DeepSpeed does around a step for parameters that never have a gradient, left out."""

from typing import Any


def walk_no_frozen(deepspeed: Any) -> None:
    """Have an engine of stage 0 clip and clear the gradients of what trains, and no others.

    By itself it walks all modules for them in every step, which in a small model takes as long as
    a layer. The order is that of its own walk, so that norms are added up to the same bits.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    trained = [own for own in deepspeed.module.parameters() if own.requires_grad]

    def clip() -> None:
        clip_grad_norm_(trained, deepspeed.gradient_clipping(), mpu=deepspeed.mpu)

    def clear() -> None:
        for parameter in trained:
            parameter.grad = None

    deepspeed.clip_fp32_gradients, deepspeed.zero_grad = clip, clear
