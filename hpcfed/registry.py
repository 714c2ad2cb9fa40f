"""What the names in a configuration stand for: our own parts, and those of a user's plug-ins.

A plug-in is a Python file that a configuration names (`plugins: [my_method.py]`) and that
registers parts:

    import hpcfed

    @hpcfed.register.sharing("b-only", "B is shared, A stays with its client")
    def b_only(layout, round_number, chosen):
        ...

Ours are given as "module:attribute", imported when they are used, so that reading a configuration
takes no time.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

# The plug-in that is being read, if one is.
_reading = ContextVar("reading", default="")


@dataclass(frozen=True)
class Named:
    """A part: what it is for, in a line, and itself, or where it is found."""

    help: str
    part: Any
    origin: str  # the plug-in, or the module, that registered it; ours: hpcfed


class Registry(Mapping[str, Any]):
    """Name -> part, of one kind."""

    def __init__(self, kind: str, own: Mapping[str, tuple[str, str]]) -> None:
        """kind: for messages. own: name -> help, where it is."""
        self.kind = kind
        self._parts = {name: Named(*pair, "hpcfed") for name, pair in own.items()}

    def __call__(self, name: str, help: str) -> Callable[[T], T]:
        """A decorator that registers a part under a name. help: a line for `hpcfed options`.

        Raises ValueError if the name is taken, but for the same file read again.
        """

        def register(part: T) -> T:
            origin = _reading.get() or str(getattr(part, "__module__", ""))
            before = self._parts.get(name)
            if before is not None and before.origin != origin:
                raise ValueError(f"there is a {self.kind} {name!r} already, in {before.origin}")
            self._parts[name] = Named(help, part, origin)
            return part

        return register

    def forget(self, origin: str) -> None:
        """Drop what this plug-in has registered."""
        self._parts = {name: own for name, own in self._parts.items() if own.origin != origin}

    def __getitem__(self, name: str) -> Any:
        """The part, imported if need be. Raises KeyError for an unknown name."""
        part = self._parts[name].part
        if isinstance(part, str):
            module, _, attribute = part.partition(":")
            part = getattr(importlib.import_module(module), attribute)
        return part

    def __contains__(self, name: object) -> bool:
        """Whether there is such a part; it is not imported, which may take torch."""
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def help(self, name: str) -> str:
        """What a part is for, in a line."""
        return self._parts[name].help


SHARING = Registry(
    "sharing rule",
    {
        "layers": (
            "the layers that layers.score chose and the head are shared, the rest is personal",
            "hpcfed.policies.sharing:layers",
        ),
        "ffa": ("LoRA's A is frozen as drawn, B is shared", "hpcfed.policies.sharing:ffa"),
        "fedsa": ("LoRA's A is shared, B is personal", "hpcfed.policies.sharing:fedsa"),
        "rolora": (
            "LoRA's B in one round, A in the next; the other is frozen",
            "hpcfed.policies.sharing:rolora",
        ),
        "fedalt": (
            "as layers, but the personal part trains first, then the shared one",
            "hpcfed.policies.sharing:fedalt",
        ),
        "nothing": ("everything is personal, the head too", "hpcfed.policies.sharing:nothing"),
    },
)

SERVERS = Registry(
    "server rule",
    {
        "mean": ("the clients' mean itself (FedAvg)", "hpcfed.server.mean:Mean"),
        "momentum": (
            "momentum of the pseudo-gradient (FedAvgM) or of its differences (FedPepTAO)",
            "hpcfed.server.momentum:Momentum",
        ),
        "adam": ("FedAdam", "hpcfed.server.adaptive:Adaptive"),
        "yogi": ("FedYogi", "hpcfed.server.adaptive:Adaptive"),
    },
)

UPDATES = Registry(
    "update transform",
    {
        "hetlora": (
            "each client has the first ranks of LoRA, as many as it can hold; weights by norm",
            "hpcfed.policies.hetlora:HetLora",
        ),
        "ranks": (
            "each client has the first ranks of LoRA, as many as it can hold",
            "hpcfed.policies.hetlora:Ranks",
        ),
    },
)

AGGREGATIONS = Registry(
    "aggregation rule",
    {
        "mean": ("A and B of LoRA are averaged, each by itself", "hpcfed.server.factors:Mean"),
        "fedex": (
            "averaged, and what that loses of the products moves the backbone (FedEx-LoRA)",
            "hpcfed.server.factors:FedEx",
        ),
        "flora": (
            "the products move the backbone, and LoRA starts anew (FLoRA)",
            "hpcfed.server.factors:Flora",
        ),
        "flexlora": (
            "the SVD of the mean of the products (FlexLoRA)",
            "hpcfed.server.factors:FlexLora",
        ),
        "fair": (
            "averaged, and B corrected towards the mean of the products (LoRA-FAIR)",
            "hpcfed.server.factors:Fair",
        ),
        "delta": (
            "averaged, and the backbone follows by adapter.delta (Delta-LoRA)",
            "hpcfed.server.factors:Delta",
        ),
        "budget": (
            "averaged, and singular values beyond a budget are zero (AdaLoRA)",
            "hpcfed.server.budget:Budget",
        ),
    },
)

DIFFICULTIES = Registry(
    "difficulty",
    {
        "fisher": (
            "the trace of the Fisher information of its samples",
            "hpcfed.policies.curriculum:FISHER",
        ),
        "loss": ("the loss of its samples", "hpcfed.policies.curriculum:LOSS"),
        "length": ("their length in tokens", "hpcfed.policies.curriculum:length"),
        "rarity": ("the rarity of their words", "hpcfed.policies.curriculum:rarity"),
        "random": ("none, an order of each client's own", "hpcfed.policies.curriculum:RANDOM"),
        "reversed": ("Fisher, the hardest first", "hpcfed.policies.curriculum:REVERSED"),
    },
)

SCORES = Registry(
    "layer score",
    {
        "all": ("all layers are shared", "hpcfed.policies.layers:ALL"),
        "sensitivity": (
            "those most sensitive to noise on the input (FibecFed)",
            "hpcfed.engine.probe:SENSITIVITY",
        ),
        "eigenvalue": (
            "those that make samples most alike (FedPepTAO)",
            "hpcfed.engine.probe:EIGENVALUE",
        ),
        "first": ("the first", "hpcfed.policies.layers:FIRST"),
        "last": ("the last", "hpcfed.policies.layers:LAST"),
        "random": ("a random choice", "hpcfed.policies.layers:RANDOM"),
    },
)

ADAPTERS = Registry(
    "adapter",
    {
        "lora": ("low-rank updates of linear layers", "hpcfed.adapters.lora:adapt"),
        "adalora": (
            "low-rank updates with singular values of their own (AdaLoRA)",
            "hpcfed.adapters.adalora:adapt",
        ),
        "prefix": (
            "keys and values of virtual tokens in every layer (P-tuning v2)",
            "hpcfed.adapters.prompts:adapt",
        ),
        "prompt": (
            "virtual tokens in front of the first layer only",
            "hpcfed.adapters.prompts:adapt",
        ),
        "idpg": (
            "virtual tokens in front, made by a small network of each text (IDPG)",
            "hpcfed.adapters.generated:adapt",
        ),
        "attempt": (
            "a mixture of prompts in front, those of other tasks frozen, by attention to the text",
            "hpcfed.adapters.attempt:adapt",
        ),
        "lpt": (
            "virtual tokens made of each text that enter a middle layer (late prompt tuning)",
            "hpcfed.adapters.generated:adapt",
        ),
        "bottleneck": (
            "small networks behind the parts of every block (Houlsby, Pfeiffer)",
            "hpcfed.adapters.bottleneck:adapt",
        ),
    },
)

OBJECTIVES = Registry(
    "objective",
    {
        "classifier": (
            "the model's final linear layer is trained and shared",
            "hpcfed.objectives.heads:Classifier",
        ),
        "cloze": (
            "a masked language model fills the gap of task.template",
            "hpcfed.objectives.heads:Cloze",
        ),
        "label_words": (
            "a decoder goes on from task.template",
            "hpcfed.objectives.heads:LabelWords",
        ),
        "completion": (
            "a decoder answers prompts (instruction tuning); rows hold prompts and answers",
            "hpcfed.objectives.completion:Completion",
        ),
        "dpo": (
            "a decoder learns which of two answers is preferred (DPO)",
            "hpcfed.objectives.dpo:Preference",
        ),
    },
)


class Register:
    """The decorators by which a plug-in registers its parts: `@hpcfed.register.sharing(name, help)`
    and so on; docs/add-a-method.md describes each kind's interface."""

    sharing = SHARING
    update = UPDATES
    server = SERVERS
    difficulty = DIFFICULTIES
    layer_score = SCORES
    adapter = ADAPTERS
    objective = OBJECTIVES


register = Register()


def forget(plugin: str) -> None:
    """Drop what a plug-in has registered, of every kind."""
    for registry in vars(Register).values():
        if isinstance(registry, Registry):
            registry.forget(plugin)


@contextlib.contextmanager
def reading(plugin: str) -> Iterator[None]:
    """What is registered meanwhile is this plug-in's; what it registered before is gone."""
    forget(plugin)
    token = _reading.set(plugin)
    try:
        yield
    finally:
        _reading.reset(token)
