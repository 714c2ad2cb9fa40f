"""`AdapterLayout` names every trainable value once.

A trainable value belongs to a block: a transformer layer ("0", "1", ...), "input" or "head". All
values lie in one flat fp32 vector, block after block, so a block is a slice, and packing the
selected blocks is a concatenation of slices. Masks, Fisher, states, export and byte counts all
speak layout; nothing else matches parameter names.
"""

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

HEAD = "head"
INPUT = "input"  # what stands in front of the first layer


@dataclass(frozen=True)
class Entry:
    """One trainable parameter: values [offset, offset + size) of the flat vector.

    neuron_axis: the axis along which its neurons lie, for local sparsity; None: never masked.
    """

    block: str
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
        parameters: Collection[tuple[str, str, tuple[int, ...], int | None]],
    ) -> "AdapterLayout":
        """From (block, name, shape, neuron axis) in any order; names must be unique."""
        places = {HEAD: math.inf, INPUT: -1.0}
        ordered = sorted(parameters, key=lambda p: places.get(p[0]) or float(p[0]))
        entries, offset = [], 0
        for block, name, shape, axis in ordered:
            entries.append(Entry(block, name, shape, offset, axis))
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
        return tuple(dict.fromkeys(entry.block for entry in self.entries))

    @property
    def layers(self) -> tuple[str, ...]:
        """Block names without the head."""
        return tuple(block for block in self.blocks if block != HEAD)

    def others(self, blocks: Collection[str]) -> tuple[str, ...]:
        """The blocks that are not among these, in order."""
        return tuple(block for block in self.blocks if block not in blocks)

    @cached_property
    def neurons(self) -> tuple[slice, ...]:
        """For each entry, its slice of a flat vector of neurons."""
        ends = np.cumsum([0, *(entry.neurons for entry in self.entries)])
        return tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(ends))

    def expand(self, neurons: torch.Tensor) -> torch.Tensor:
        """(size,) bool of values from (neurons,) bool; what has no neurons is True."""
        values = torch.ones(self.size, dtype=torch.bool)
        for entry, span in zip(self.entries, self.neurons, strict=True):
            if entry.neuron_axis is not None:
                shape = [1] * len(entry.shape)
                shape[entry.neuron_axis] = entry.neurons
                values[entry.values] = neurons[span].reshape(shape).expand(entry.shape).flatten()
        return values

    def span(self, block: str) -> slice:
        """The block's slice of the flat vector."""
        entries = [entry for entry in self.entries if entry.block == block]
        return slice(entries[0].offset, entries[-1].offset + entries[-1].size)

    def spans(self, blocks: Collection[str]) -> Iterator[slice]:
        """Slices of the named blocks, in layout order."""
        return (self.span(block) for block in self.blocks if block in blocks)

    def count(self, blocks: Collection[str]) -> int:
        """Number of values in the named blocks."""
        return sum(span.stop - span.start for span in self.spans(blocks))

    def pack(self, vector: torch.Tensor, blocks: Collection[str]) -> torch.Tensor:
        """The named blocks' values (count(blocks),) of a flat vector (size,)."""
        parts = [vector[span] for span in self.spans(blocks)]
        return torch.cat(parts) if parts else vector[:0].clone()

    def unpack(self, packed: torch.Tensor, blocks: Collection[str], into: torch.Tensor) -> None:
        """Write packed values (count(blocks),) to their places in a flat vector (size,)."""
        if len(packed) != self.count(blocks):
            raise ValueError(f"{len(packed)} packed values for blocks of {self.count(blocks)}")
        start = 0
        for span in self.spans(blocks):
            length = span.stop - span.start
            into[span] = packed[start : start + length]
            start += length
