"""Adapted matrices as factors: A and B of LoRA, U and V of the residual, by the layout's entries.

W x + s (B A + U V) x, with A (r, d_in), B (d_out, r), V (q, d_in), U (d_out, q), s = alpha / r.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcfed.adapters.layout import AdapterLayout, Entry


@dataclass(frozen=True)
class Matrix:
    """The entries of one adapted matrix; u, v: None without a residual."""

    a: Entry
    b: Entry
    u: Entry | None = None
    v: Entry | None = None


def beside_name(name: str, role: str) -> str:
    """Name of another factor of the matrix of which A, or B, has this name."""
    at = "residual" if role in ("U", "V") else "lora"
    return name.replace("lora_A", f"{at}_{role}").replace("lora_B", f"{at}_{role}")


def matrices(layout: AdapterLayout) -> Iterator[Matrix]:
    """All that LoRA adapts, in the layout's order."""
    entries = {entry.name: entry for entry in layout.entries}
    for entry in layout.roles("A").entries:
        b, u, v = (entries.get(beside_name(entry.name, role)) for role in ("B", "U", "V"))
        if b is not None:
            yield Matrix(entry, b, u, v)


def merged(
    tensors: dict[str, torch.Tensor], layout: AdapterLayout, gain: float
) -> dict[str, torch.Tensor]:
    """A PEFT checkpoint in which the residual is part of LoRA: r + q ranks, A over V and B beside
    U. gain: of B A in the forward pass."""
    for matrix in matrices(layout):
        a, b = matrix.a.name, matrix.b.name
        if gain != 1:
            tensors[b] = gain * tensors[b]
        if matrix.u is not None and matrix.v is not None:
            tensors[a] = torch.cat([tensors[a], tensors.pop(matrix.v.name)])
            tensors[b] = torch.cat([tensors[b], tensors.pop(matrix.u.name)], dim=1)
    return tensors


def uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """U(-1/sqrt(d_in), 1/sqrt(d_in)): where A starts."""
    bound = 1 / math.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape)
