"""What every adapter is made of: the adapted model, its layout, and how it is saved."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hpcfed.adapters.factors import merged
from hpcfed.adapters.layout import HEAD, RESIDUAL, SPARSE, AdapterLayout
from hpcfed.adapters.network import Network
from hpcfed.errors import UserError
from hpcfed.rng import generator

# (rng, shape) -> where a parameter's values start
Draw = Callable[[np.random.Generator, tuple[int, ...]], npt.NDArray[np.float64]]


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> Any:
    """N(0, std)."""
    return rng.normal(0, std, shape)


def zero(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Zeros; nothing is drawn."""
    return np.zeros(shape)


@dataclass(frozen=True)
class Trainable:
    """A trainable parameter, or a factor of the residual: its block, its role there, its name
    where PEFT saves it, the module it belongs to, where its values start, and the axis of its
    neurons (None: it is never masked)."""

    block: str
    role: str
    name: str
    parameter: nn.Parameter
    owner: nn.Module
    draw: Draw
    neuron_axis: int | None = None


@dataclass(frozen=True)
class Adapted:
    """A network with its trainable parameters.

    network(positions=None, **inputs) gives logits. trainables: in layout order. blocks: the
    transformer's blocks. description: a peft.PeftConfig, or what adapter_config.json holds where
    PEFT has no such adapter. prefix: of the names under which the model's own weights are saved.
    extra: forwards without a gradient that a sample takes besides its own. frozen: what else is
    saved with the values, by name.
    """

    network: Network
    trainables: tuple[Trainable, ...]
    layout: AdapterLayout
    blocks: tuple[nn.Module, ...]
    description: Any
    prefix: str
    columns: bool = False  # PEFT keeps the blocks as columns of one embedding
    gain: float = 1.0  # of B A in the forward pass, see hpcfed.adapters.residual
    extra: int = 0
    frozen: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """In layout order."""
        return tuple(t.parameter for t in self.trainables)

    def split(self) -> tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]:
        """What trains, and the factors of the residual, each in layout order."""
        residual = tuple(t.parameter for t in self.trainables if t.role in RESIDUAL)
        return tuple(t.parameter for t in self.trainables if t.role not in RESIDUAL), residual

    def owners(self) -> dict[nn.Module, list[int]]:
        """Modules with trained values -> the entries that are its weight and, if any, its bias."""
        found: dict[nn.Module, list[int]] = {}
        for index, trainable in enumerate(self.trainables):
            if trainable.role not in RESIDUAL:
                found.setdefault(trainable.owner, []).append(index)
        return found

    def initial(self, seed: int) -> torch.Tensor:
        """(layout.size,) fp32: the values that training starts from."""
        vector = np.zeros(self.layout.size, dtype=np.float32)
        for trainable, entry in zip(self.trainables, self.layout.entries, strict=True):
            drawn = trainable.draw(generator(seed, "init", entry.name), entry.shape)
            vector[entry.values] = drawn.ravel()
        return torch.from_numpy(vector)

    def saved(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values (layout.size,) as the tensors of a PEFT checkpoint."""
        tensors = {
            entry.name: values[entry.values].reshape(entry.shape).clone()
            for entry in self.layout.entries
        }
        if self.columns:
            parts = [
                tensors.pop(entry.name).flatten(1)
                for entry in self.layout.entries
                if entry.block != HEAD
            ]
            tensors["prompt_embeddings"] = torch.cat(parts, dim=1)
        for entry in self.layout.roles(SPARSE).entries:
            if tensors.pop(entry.name).any():
                raise UserError(
                    "These values are of SLoRA's first stage, which changes single weights and is "
                    "no LoRA; take another round, or export it with --merge."
                )
        return {**merged(tensors, self.layout, self.gain), **self.frozen}


def assemble(
    network: Network,
    model: nn.Module,
    trainables: list[Trainable],
    blocks: dict[str, str],
    description: Any,
    prefix: str,
    columns: bool = False,
    gain: float = 1.0,
    extra: int = 0,
    frozen: Mapping[str, torch.Tensor] | None = None,
) -> Adapted:
    """Lay out the parameters. blocks: module name of each transformer block in `model`."""
    layout = AdapterLayout.build(
        [(t.block, t.role, t.name, full_shape(t.parameter), t.neuron_axis) for t in trainables]
    )
    by_name = {t.name: t for t in trainables}
    ordered = tuple(by_name[entry.name] for entry in layout.entries)
    modules = tuple(model.get_submodule(name) for name in blocks)
    return Adapted(
        network, ordered, layout, modules, description, prefix, columns, gain, extra, frozen or {}
    )


def transformer_blocks(model: Any) -> dict[str, str]:
    """Module name of each transformer block -> its block name "0", "1", ...

    A stack is an outermost ModuleList whose entries hold at least two weight matrices each; an
    encoder and a decoder are two stacks. Of a model that sees more than text only the stacks beside
    the text's embeddings count. A block that is used many times (ALBERT) is one block.
    """
    stacks = _stacks("", model)
    if not getattr(model.config, "is_encoder_decoder", False):
        place = _embedding_name(model)
        while place:
            place = place.rpartition(".")[0]
            beside = [name for name in stacks if not place or name.startswith(f"{place}.")]
            if beside:
                stacks = beside
                break
    names = [f"{stack}.{i}" for stack in stacks for i in range(len(model.get_submodule(stack)))]
    if not names:
        raise UserError(
            f"model.name: no stack of transformer blocks was found in {type(model).__name__}; "
            "this architecture is not supported."
        )
    return {name: str(index) for index, name in enumerate(names)}


def _stacks(name: str, module: nn.Module) -> list[str]:
    """Names of the stacks inside a module, in order."""
    found = []
    for child_name, child in module.named_children():
        inner = f"{name}.{child_name}" if name else child_name
        if isinstance(child, nn.ModuleList) and len(child) and all(map(_is_block, child)):
            found.append(inner)
        else:
            found += _stacks(inner, child)
    return found


def _is_block(module: nn.Module) -> bool:
    matrices = sum(len(full_shape(parameter)) > 1 for parameter in module.parameters())
    return matrices > 1 and not isinstance(module, nn.ModuleList)


def _embedding_name(model: Any) -> str:
    """Name of the module that embeds token ids; "" where the model does not tell."""
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return ""
    return next((name for name, module in model.named_modules() if module is embedding), "")


def text_config(model: Any) -> Any:
    """The configuration of what reads text: a part of it where a model sees images too."""
    return model.config.get_text_config()


def block_of(name: str, blocks: dict[str, str]) -> str | None:
    """The block that a module or parameter of this name lies in."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((blocks[prefix] for prefix in prefixes if prefix in blocks), None)


def final_linear(model: nn.Module, labels: int) -> str:
    """Name of the classifier: the last linear layer with one output per label."""
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == labels
    ]
    if not heads:
        raise UserError(
            f"{type(model).__name__} has no linear layer with {labels} outputs to use as the head."
        )
    return heads[-1]


def train_head(model: nn.Module, head: str | None, prefix: str, std: float) -> list[Trainable]:
    """Make the final linear layer of this name, if any, trainable: weight N(0, std), bias 0."""
    if head is None:
        return []
    owner = model.get_submodule(head)
    trainables = []
    for name, parameter in owner.named_parameters():
        parameter.requires_grad_(True)
        draw = partial(normal, std=std) if len(full_shape(parameter)) > 1 else zero
        trainables.append(Trainable(HEAD, name, f"{prefix}{head}.{name}", parameter, owner, draw))
    return trainables


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
