"""`AdapterLayout` names every trainable value once, and a `Part` is some of them.

A trainable value belongs to a block: a transformer layer ("0", "1", ...), "input" or "head"; and it
has a role there ("A" or "B" of LoRA, "prompt", ...). All values lie in one flat fp32 vector, entry
after entry. What is shared, personal or frozen in a round is a Part: it counts, packs, unpacks and
masks. Nothing else matches parameter names.
"""

import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

HEAD = "head"
RESIDUAL = ("U", "V")  # roles of the factors beside a frozen backbone
SPARSE = "sparse"  # role of values of the backbone itself
INPUT = "input"  # what stands in front of the first layer


@dataclass(frozen=True)
class Entry:
    """One trainable parameter: values [offset, offset + size) of the flat vector.

    block: its layer, INPUT or HEAD. role: what it is there: "A" and "B" of LoRA, "prompt", "down"
    and "up" of a bottleneck, "weight" and "bias" of the head, "U" and "V" of a residual beside the
    backbone, which is the server's and never trained, SPARSE values of the backbone. neuron_axis:
    the axis along which its neurons lie, for local sparsity; None: never masked.
    """

    block: str
    role: str
    name: str
    shape: tuple[int, ...]
    offset: int
    neuron_axis: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def values(self) -> slice:
        return slice(self.offset, self.offset + self.size)

    @property
    def neurons(self) -> int:
        """How many neurons it has."""
        return 0 if self.neuron_axis is None else self.shape[self.neuron_axis]


@dataclass(frozen=True)
class AdapterLayout:
    """The trainable values of a model, in order of layers: the input first, the head last."""

    entries: tuple[Entry, ...]

    @staticmethod
    def build(
        parameters: Collection[tuple[str, str, str, tuple[int, ...], int | None]],
    ) -> "AdapterLayout":
        """From (block, role, name, shape, neuron axis) in any order; names must be unique."""
        places = {HEAD: math.inf, INPUT: -1.0}
        ordered = sorted(parameters, key=lambda p: places.get(p[0]) or float(p[0]))
        entries, offset = [], 0
        for block, role, name, shape, axis in ordered:
            entries.append(Entry(block, role, name, shape, offset, axis))
            offset += math.prod(shape)
        return AdapterLayout(tuple(entries))

    @property
    def size(self) -> int:
        """Number of trainable values."""
        last = self.entries[-1]
        return last.offset + last.size

    @property
    def blocks(self) -> tuple[str, ...]:
        """Block names in order."""
        return self.whole.blocks

    @property
    def layers(self) -> tuple[str, ...]:
        """Block names without the head."""
        return self.whole.layers

    @cached_property
    def whole(self) -> "Part":
        """All of it."""
        return Part(self, tuple(range(len(self.entries))))

    @cached_property
    def residual(self) -> "Part":
        """What the server moves beside the backbone: part of the state, and never trained."""
        return self.roles(*RESIDUAL)

    @cached_property
    def trained(self) -> "Part":
        """What clients may train."""
        return self.whole - self.residual

    def part(self, blocks: Collection[str]) -> "Part":
        """What lies in these blocks."""
        return self._where(lambda entry: entry.block in blocks)

    def roles(self, *roles: str) -> "Part":
        """What has one of these roles, in whatever block."""
        return self._where(lambda entry: entry.role in roles)

    def span(self, block: str) -> slice:
        """The block's slice of the flat vector."""
        (span,) = self.part((block,)).slices
        return span

    def _where(self, chosen: Callable[[Entry], bool]) -> "Part":
        indices = [index for index, entry in enumerate(self.entries) if chosen(entry)]
        return Part(self, tuple(indices))

    @cached_property
    def neurons(self) -> tuple[slice, ...]:
        """For each entry, its slice of a flat vector of neurons."""
        ends = np.cumsum([0, *(entry.neurons for entry in self.entries)])
        return tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(ends))

    def expand(self, neurons: torch.Tensor) -> torch.Tensor:
        """(size,) bool of values from (neurons,) bool; what has no neurons is True."""
        values = torch.ones(self.size, dtype=torch.bool)
        for entry, own in zip(self.entries, self.neurons, strict=True):
            if entry.neuron_axis is not None:
                shape = [1] * len(entry.shape)
                shape[entry.neuron_axis] = entry.neurons
                values[entry.values] = neurons[own].reshape(shape).expand(entry.shape).flatten()
        return values


@dataclass(frozen=True)
class Part:
    """Some entries of a layout, by their indices, in its order."""

    layout: AdapterLayout
    indices: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.indices)

    def __or__(self, other: "Part") -> "Part":
        return Part(self.layout, tuple(sorted({*self.indices, *other.indices})))

    def __and__(self, other: "Part") -> "Part":
        return Part(self.layout, tuple(i for i in self.indices if i in set(other.indices)))

    def __sub__(self, other: "Part") -> "Part":
        return Part(self.layout, tuple(i for i in self.indices if i not in set(other.indices)))

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self.layout.entries[index] for index in self.indices)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that it has something of, in order."""
        return tuple(dict.fromkeys(entry.block for entry in self.entries))

    @property
    def layers(self) -> tuple[str, ...]:
        """The same without the head."""
        return tuple(block for block in self.blocks if block != HEAD)

    @cached_property
    def size(self) -> int:
        """Number of values."""
        return sum(entry.size for entry in self.entries)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Its slices of the flat vector, in order, neighbours joined."""
        joined: list[slice] = []
        for entry in self.entries:
            if joined and joined[-1].stop == entry.offset:
                joined[-1] = slice(joined[-1].start, entry.offset + entry.size)
            else:
                joined.append(entry.values)
        return tuple(joined)

    def pack(self, vector: torch.Tensor) -> torch.Tensor:
        """Its values (size,) of a flat vector (layout.size,)."""
        parts = [vector[piece] for piece in self.slices]
        return torch.cat(parts) if parts else vector[:0].clone()

    def unpack(self, packed: torch.Tensor, into: torch.Tensor) -> None:
        """Write packed values (size,) to their places in a flat vector (layout.size,)."""
        if len(packed) != self.size:
            raise ValueError(f"{len(packed)} packed values for a part of {self.size}")
        start = 0
        for piece in self.slices:
            length = piece.stop - piece.start
            into[piece] = packed[start : start + length]
            start += length

    def mask(self) -> torch.Tensor:
        """(layout.size,) bool, True in this part."""
        mask = torch.zeros(self.layout.size, dtype=torch.bool)
        for piece in self.slices:
            mask[piece] = True
        return mask
