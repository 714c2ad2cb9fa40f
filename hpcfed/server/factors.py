"""What the server makes of clients' LoRA factors, each client's by itself: the mean of the products
B_k A_k is not the product of the means.

p_k: a client's share of the rows; Abar, Bbar: the means; M = sum p_k B_k A_k, in all that follows
without LoRA's factor alpha / r. Nothing here is as large as a weight: products stay factors, and
are cut to a rank by QR of both and an SVD of the core between.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hpcfed.adapters.factors import Matrix, matrices, uniform
from hpcfed.adapters.layout import AdapterLayout, Part
from hpcfed.rng import generator
from hpcfed.round import Round
from hpcfed.settings.config import Config

# Directions whose singular value is this much smaller than the largest are rounding.
NOTHING = 1e-7


@dataclass(frozen=True)
class Sent:
    """What a client sent: the factors (n,) of all matrices, packed, and its weight in the mean."""

    weight: int
    values: torch.Tensor


@dataclass
class Factors:
    """Of one matrix, float64: A (r, d_in), B (d_out, r), U (d_out, q), V (q, d_in); q = 0 without a
    residual."""

    a: torch.Tensor
    b: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor


# A share p_k of the weight, and the factors B_k, A_k that a client sent.
Share = tuple[float, torch.Tensor, torch.Tensor]


class Rule:
    """One that makes nothing of them: FedAvg.

    gathers: each client's own factors come together on the first rank. settles: `next` is asked.
    senses: clients measure how much each value matters, and report `extra` numbers made of it,
    which are averaged as values are.
    """

    gathers = settles = True
    senses = False
    extra = 0
    # Whether a client draws its factors from the seed, instead of getting them.
    draws = False

    def __init__(self, config: Config, layout: AdapterLayout) -> None:
        self._config, self.layout = config, layout
        self.part: Part = layout.roles("A", "B")  # what each client's own is wanted of
        self.matrices = list(matrices(layout))

    def report(self, importance: torch.Tensor) -> torch.Tensor:
        """(extra,) what a client tells of how much its values (layout.size,) matter."""
        return importance[:0]

    def rests(self, values: torch.Tensor, number: int) -> torch.Tensor | None:
        """(layout.size,) bool: what nobody trains or sends in round `number`, though it is of the
        shared part; None: nothing. values: the run's."""
        return None

    def plan(self) -> Iterator[str]:
        """Lines of the plan: what changes with the rounds."""
        yield from ()

    def note(self, values: torch.Tensor, lost: float) -> dict[str, float]:
        """For the round's record. values: the run's next ones; lost: as `next` says."""
        return {"residual_lost": lost} if self.layout.residual else {}

    def next(
        self, values: torch.Tensor, sent: Sequence[Sent], now: Round, told: torch.Tensor
    ) -> tuple[torch.Tensor, float]:
        """The run's next values (layout.size,), and the share of the residual that its rank could
        not hold, of its Frobenius norm. values: with the clients' means in what they share. told
        (extra,): the mean of what they report."""
        values = values.clone()
        total = sum(own.weight for own in sent)
        whole = []
        for own in sent:
            vector = torch.zeros(self.layout.size, dtype=torch.float64)
            self.part.unpack(own.values.double(), vector)
            whole.append((own.weight / total, vector))
        lost = kept = 0.0
        for matrix in self.matrices:
            shares = [(p, _of(v, matrix)[1], _of(v, matrix)[0]) for p, v in whole]
            factors = Factors(*_of(values.double(), matrix), *_residual(values.double(), matrix))
            cut = self.combine(shares, factors, matrix, now)
            lost, kept = lost + cut[0], kept + cut[1]
            found = [(matrix.a, factors.a), (matrix.b, factors.b)]
            found += [(e, t) for e, t in ((matrix.u, factors.u), (matrix.v, factors.v)) if e]
            for entry, tensor in found:
                values[entry.values] = tensor.float().flatten()
        return values, (lost / (lost + kept)) ** 0.5 if lost else 0.0

    def combine(
        self, clients: list[Share], factors: Factors, matrix: Matrix, now: Round
    ) -> tuple[float, float]:
        """Change one matrix's factors, which come with A and B at their means; the squared norms of
        what of the residual was cut off, and was kept."""
        return 0.0, 0.0


class Mean(Rule):
    """FedAvg: A and B are averaged, each by itself."""

    gathers = settles = False


class FedEx(Rule):
    """FedEx-LoRA (Singhal et al. 2025): A and B are averaged, and what that loses, M - Bbar Abar,
    moves the backbone, so that the model is the mean of the clients' models. Clients weigh by rows;
    the published code weighs them alike."""

    strength = 1.0

    def combine(
        self, clients: list[Share], factors: Factors, matrix: Matrix, now: Round
    ) -> tuple[float, float]:
        """U V + strength (M - Bbar Abar)."""
        lefts = [factors.u, -self.strength * factors.b]
        lefts += [self.strength * p * b for p, b, _ in clients]
        rights = [factors.v, factors.a, *(a for _, _, a in clients)]
        return _hold(lefts, rights, factors)


class Delta(FedEx):
    """Delta-LoRA (Zi et al. 2023) in a federation, which is ours: the backbone follows LoRA from
    the first step on, W += delta s (B' A' - B A), and is averaged as what it is, a sum of products.
    With the part that lies in the forward pass (hpcfed.adapters.residual) taken off, what is left
    between two rounds is delta times FedEx-LoRA's residual."""

    def __init__(self, config: Config, layout: AdapterLayout) -> None:
        super().__init__(config, layout)
        self.strength = config.adapter.delta


class Flora(Rule):
    """FLoRA (Wang et al. 2024): the clients' factors are stacked, one of the two scaled by p_k, and
    folded into the backbone: U V + M. LoRA then starts anew, A from the seed and B at zero."""

    draws = True

    def combine(
        self, clients: list[Share], factors: Factors, matrix: Matrix, now: Round
    ) -> tuple[float, float]:
        """U V + M; A, B anew."""
        lefts = [factors.u, *(p * b for p, b, _ in clients)]
        rights = [factors.v, *(a for _, _, a in clients)]
        rng = generator(self._config.seed, "flora", now.number, matrix.a.name)
        factors.a = torch.from_numpy(uniform(rng, matrix.a.shape))
        factors.b = torch.zeros_like(factors.b)
        return _hold(lefts, rights, factors)


class FlexLora(Rule):
    """FlexLoRA (Bai et al. 2024): the best B A of rank r to M, by SVD; a client that can hold less
    takes its first ranks, which are the best of their number. Directions that M does not have keep
    A's mean beside a B of zero (ours), so that they can still learn."""

    def combine(
        self, clients: list[Share], factors: Factors, matrix: Matrix, now: Round
    ) -> tuple[float, float]:
        """B A = M cut to r ranks."""
        rank = len(factors.a)
        left, right, s = cut([p * b for p, b, _ in clients], [a for _, _, a in clients])
        found = min(rank, int((s > NOTHING * s.max()).sum())) if len(s) else 0
        factors.a, factors.b = factors.a.clone(), torch.zeros_like(factors.b)
        factors.a[:found], factors.b[:, :found] = right[:found], left[:, :found]
        return 0.0, 0.0


class Fair(Rule):
    """LoRA-FAIR (Bian et al. 2025): the server corrects Bbar so that (Bbar + dB) Abar comes close
    to M. The distance is ours, a ridge: dB = R Abar' (Abar Abar' + lambda I)^-1, R = M - Bbar Abar,
    lambda = aggregation.ridge times the mean square of Abar's rows; the paper's is a similarity."""

    def combine(
        self, clients: list[Share], factors: Factors, matrix: Matrix, now: Round
    ) -> tuple[float, float]:
        """Bbar + dB."""
        a, b = factors.a, factors.b
        gram = a @ a.T
        missing = -b @ gram
        for p, b_k, a_k in clients:
            missing += p * (b_k @ (a_k @ a.T))
        ridge = self._config.aggregation.ridge * gram.diagonal().mean()
        ridged = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
        factors.b = b + torch.linalg.lstsq(ridged, missing.T).solution.T
        return 0.0, 0.0


def cut(
    lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U sqrt(S), sqrt(S) V', S) of the sum of lefts[i] @ rights[i], (d_out, r_i) by (r_i, d_in),
    largest first; of each direction the largest entry of U is positive."""
    q_left, r_left = torch.linalg.qr(torch.cat(list(lefts), dim=1))
    q_right, r_right = torch.linalg.qr(torch.cat(list(rights)).T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    left, right = q_left @ u, v @ q_right.T
    largest = left.abs().argmax(0, keepdim=True)
    sign = left.gather(0, largest).sign()
    root = s.sqrt()
    return left * sign * root, root[:, None] * sign.T * right, s


def _hold(
    lefts: Sequence[torch.Tensor], rights: Sequence[torch.Tensor], factors: Factors
) -> tuple[float, float]:
    """Make the residual the sum of these products, as far as its rank goes; squared norms of what
    was cut off, and of what was kept."""
    left, right, s = cut(lefts, rights)
    rank = min(factors.u.shape[1], len(s))
    factors.u, factors.v = torch.zeros_like(factors.u), torch.zeros_like(factors.v)
    factors.u[:, :rank], factors.v[:rank] = left[:, :rank], right[:rank]
    square = s.square()
    more = s[rank:] > NOTHING * s.max() if len(s) else s > 0
    return float((square[rank:] * more).sum()), float(square[:rank].sum())


def _of(values: torch.Tensor, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in a vector (layout.size,)."""
    a, b = (values[entry.values].reshape(entry.shape) for entry in (matrix.a, matrix.b))
    return a, b


def _residual(values: torch.Tensor, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """U and V; of rank 0 if there are none."""
    if matrix.u is None or matrix.v is None:
        return values.new_zeros(matrix.b.shape[0], 0), values.new_zeros(0, matrix.a.shape[1])
    u, v = (values[entry.values].reshape(entry.shape) for entry in (matrix.u, matrix.v))
    return u, v
