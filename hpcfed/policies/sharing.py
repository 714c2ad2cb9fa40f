"""Sharing rules: which of a model's values travel in a round, which stay with their client, and
which nobody trains.

A rule is a function (layout, round_number, chosen) -> Split. round_number: from 0. chosen: the
values of the layers that layers.score has chosen, and the head. What is shared or frozen is one
model, the server's; what is personal lies in a file of each client.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from hpcfed.adapters.layout import AdapterLayout, Part


@dataclass(frozen=True)
class Split:
    """A round's values, each in one of three parts.

    shared: trained, sent, aggregated. personal: trained, and kept by the client; the same in all
    rounds of the method. frozen: as the server has it. fetched: what of it other rounds train, so
    that a sampled client must fetch it. phases: parts that are trained one after the other, each in
    an equal part of the round's steps, while all else is frozen; none: all together.
    """

    shared: Part
    personal: Part
    frozen: Part
    fetched: Part
    phases: tuple[Part, ...] = ()


# (layout, round_number, chosen) -> Split
Rule = Callable[[AdapterLayout, int, Part], Split]


class Sharing:
    """A rule, round by round. During the warm-up everything is shared."""

    def __init__(self, rule: Rule, layout: AdapterLayout) -> None:
        self._rule, self._layout = rule, layout

    def split(self, round_number: int, warm: bool, chosen: Collection[str]) -> Split:
        """The split of a round. chosen: blocks.

        Raises ValueError if a rule's parts overlap, or leave something out.
        """
        rule = layers if warm else self._rule
        split = rule(self._layout, round_number, self._layout.part(chosen))
        residual = self._layout.residual
        if residual:  # the server's, whatever the rule; it has none before the method begins
            split = replace(
                split,
                shared=split.shared - residual,
                personal=split.personal - residual,
                frozen=split.frozen | residual,
                fetched=split.fetched if warm else split.fetched | residual,
            )
        parts = (split.shared, split.personal, split.frozen)
        indices = sorted(index for part in parts for index in part.indices)
        if indices != list(self._layout.whole.indices):
            raise ValueError("a sharing rule must give each entry to one part")
        return split

    def personal(self, chosen: Collection[str]) -> Part:
        """What is personal in all rounds of the method."""
        return self.split(0, False, chosen).personal


def layers(layout: AdapterLayout, round_number: int, chosen: Part) -> Split:
    """The chosen layers are shared, the others personal (FibecFed, FedPepTAO)."""
    none = layout.part(())
    return Split(chosen, layout.whole - chosen, none, none)


def ffa(layout: AdapterLayout, round_number: int, chosen: Part) -> Split:
    """FFA-LoRA (Sun et al. 2024): A stays as the seed has drawn it, the same for all; so the mean
    of B A is the mean of B, times A."""
    a = layout.roles("A")
    return Split(chosen - a, layout.whole - chosen - a, a, layout.part(()))


def fedsa(layout: AdapterLayout, round_number: int, chosen: Part) -> Split:
    """FedSA-LoRA (Guo et al. 2025): A is shared, B stays with its client. The head is shared here;
    the authors' configuration keeps it with the client too."""
    shared = chosen - layout.roles("B")
    return Split(shared, layout.whole - shared, layout.part(()), layout.part(()))


def rolora(layout: AdapterLayout, round_number: int, chosen: Part) -> Split:
    """RoLoRA (Chen et al. 2025): B in even rounds and A in odd ones, the other frozen at its mean;
    so each round's mean of B A is exact. B comes first: while it is zero, A has no gradient."""
    frozen = layout.roles("A" if round_number % 2 == 0 else "B") & chosen
    return Split(chosen - frozen, layout.whole - chosen, frozen, frozen)


def fedalt(layout: AdapterLayout, round_number: int, chosen: Part) -> Split:
    """FedAlt (Pillutla et al. 2022): first the personal part trains, while what is shared is
    frozen, then the other way round. Both together, FedSim there, is `layers` here."""
    split = layers(layout, round_number, chosen)
    return replace(split, phases=(split.personal, split.shared))


def nothing(layout: AdapterLayout, round_number: int, chosen: Part) -> Split:
    """Every client trains alone, its head too."""
    none = layout.part(())
    return Split(none, layout.whole, none, none)
