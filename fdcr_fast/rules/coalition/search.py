"""The minority of clients that is most of a coalition, given how clients resemble each other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

_EXACT = 14  # up to so many clients all minorities are compared
_STARTS = 16  # as many clients as this are grown into sets
_STRIDE = 20  # a set of more clients grows by this part of itself at a time
_POLISHED = 4  # as many of the sets are improved client by client
_TEMPERATURE = 2.0  # of J as the logarithm of a likelihood
_SWAPPED = 32  # swaps are of so many clients inside with so many outside


@dataclass(frozen=True)
class Views:
    """What a coalition is looked for in; float64.

    Attributes:
        similarity: ``A [K, K]``, how alike the updates of two clients are; symmetric, diagonal 0.
        concentration: ``c [K]``, how much a client's update stands out by itself.
    """

    similarity: Tensor
    concentration: Tensor

    def __len__(self) -> int:
        return len(self.concentration)

    @cached_property
    def rows(self) -> Tensor:
        """Sums of the rows of ``A``."""
        return self.similarity.sum(1)

    @cached_property
    def totals(self) -> tuple[Tensor, Tensor]:
        """The sum of ``A``, and that of ``c``."""
        return self.rows.sum(), self.concentration.sum()

    @cached_property
    def minority_scores(self) -> Tensor:
        """``J`` of all :func:`minorities`, float64 ``[R]``."""
        return _Sets(minorities(len(self)), self).scores()


@dataclass(frozen=True)
class _Sums:
    """Sums over sets of clients, from which their score follows; a batch of any shape.

    ``a`` is the sum of ``A`` within the set, ``da`` that over its rows, ``c`` that of ``c``.
    """

    size: Tensor
    a: Tensor
    da: Tensor
    c: Tensor


def _score(sums: _Sums, views: Views) -> Tensor:
    K = len(views)
    s, r = sums.size, K - sums.size
    total_a, total_c = views.totals
    inside = sums.a / (s * (s - 1)).clamp(min=1)  # of a single client its similarity to nobody: 0, the mean of A
    across = (sums.da - sums.a) / (s * r).clamp(min=1)
    outside = (total_a - 2 * sums.da + sums.a) / (r * (r - 1)).clamp(min=1)
    c = sums.c / s.clamp(min=1) - (total_c - sums.c) / r
    return (s * r).sqrt() * (inside - 2 * across + outside + c)


class _Sets:
    """A batch of sets ``[R, K]`` and, for every client, its similarity to each of them."""

    def __init__(self, members: Tensor, views: Views, similarity: Tensor | None = None) -> None:
        inside = members.double()
        self.members = members
        self.views = views
        self.similarity = inside @ views.similarity if similarity is None else similarity
        self.sums = _Sums(
            inside.sum(1),
            (inside * self.similarity).sum(1),
            inside @ views.rows,
            inside @ views.concentration,
        )

    def scores(self) -> Tensor:
        """``J [R]``."""
        return _score(self.sums, self.views)

    def flipped(self, clients: Tensor) -> _Sets:
        """Every set with its client of ``clients [R]`` in where it was out, and out where it was in."""
        sets = torch.arange(len(clients))
        sign = torch.where(self.members[sets, clients], -1.0, 1.0).double()[:, None]
        members = self.members.clone()
        members[sets, clients] ^= True
        return _Sets(members, self.views, self.similarity + sign * self.views.similarity[clients])

    def joined(self, clients: Tensor) -> _Sets:
        """Every set with its clients of ``clients [R, n]``, which were out, in."""
        members = self.members.scatter(1, clients, True)
        return _Sets(members, self.views, self.similarity + self.views.similarity[clients].sum(1))

    def changed(self, sign: int) -> Tensor:
        """``J [R, K]`` of every set with one client more, or one less; -inf where there is none such."""
        t = self.sums
        sums = _Sums(
            t.size[:, None] + sign,
            t.a[:, None] + 2 * sign * self.similarity,
            t.da[:, None] + sign * self.views.rows,
            t.c[:, None] + sign * self.views.concentration,
        )
        possible = ~self.members if sign > 0 else self.members
        return torch.where(possible, _score(sums, self.views), -torch.inf)

    def swapped(self, leave: Tensor, join: Tensor) -> Tensor:
        """``J [len(leave), len(join)]`` of the first set without a client that leaves and with one that joins."""
        t, A, c, a = self.sums, self.views.similarity, self.views.concentration, self.similarity[0]
        out = leave[:, None]
        sums = _Sums(
            t.size[0],
            t.a[0] - 2 * a[out] + 2 * (a[join] - A[out, join]),
            t.da[0] - self.views.rows[out] + self.views.rows[join],
            t.c[0] - c[out] + c[join],
        )
        return _score(sums, self.views)


def find_coalition(views: Views) -> tuple[Tensor, float]:
    r"""The set ``S`` of at most ``floor((K - 1) / 2)`` clients with the largest score

    .. math:: J(S) = \sqrt{|S||R|} \left[ A_{SS} - 2 A_{SR} + A_{RR} + c_S - c_R \right]

    where ``R`` are the others, two indices mean the mean over a block without the diagonal, and ``A_SS`` is 0 for a
    single client. All sets are compared up to 14 clients; beyond, sets are grown greedily from the clients of
    the best pairs, and the best of them improved by adding, removing and swapping clients until nothing helps (of the
    swaps those of the 32 clients that one would rather remove with the 32 that one would rather add).

    Args:
        views: Views of ``K >= 3`` clients.

    Returns:
        Membership, bool ``[K]``, and ``J``.
    """
    K = len(views)
    if K < 3:
        raise ValueError(f"a minority takes at least 3 clients, got {K}")
    if K <= _EXACT:
        score, best = views.minority_scores.max(0)
        return minorities(K)[best], score.item()
    candidates = [_improved(members, views) for members in _grown(views)]
    return max(candidates, key=lambda found: found[1])


def set_scores(members: Tensor, views: Views) -> Tensor:
    """``J`` of sets, float64 ``[R]``, from membership, bool ``[R, K]``."""
    return _Sets(members, views).scores()


def margins(members: Tensor, views: Views) -> Tensor:
    """By how much the best set with each client beats the best one without it, in ``J``; float64 ``[K]``.

    Positive for the clients of the coalition, and the smaller the less a decision about the client was worth. Up to
    14 clients the sets are all minorities; beyond, those that differ from the coalition in this client alone, of which
    the empty one has ``J = 0`` and one that is no minority any more may be better than the coalition.

    Args:
        members: The coalition, bool ``[K]``; see :func:`find_coalition`.
        views: Views of ``K >= 3`` clients.
    """
    K = len(views)
    if K <= _EXACT:
        inside, scores = minorities(K), views.minority_scores[:, None]
        having = torch.where(inside, scores, -torch.inf).amax(0)
        return having - torch.where(inside, -torch.inf, scores).amax(0)
    coalition = _Sets(members[None], views)
    score = coalition.scores()
    return torch.where(members, score - coalition.changed(-1)[0], coalition.changed(+1)[0] - score)


def membership(members: Tensor, views: Views) -> Tensor:
    """How likely each client is in the coalition, if ``S`` is it as likely as ``exp(J(S) / 2)``; float64 ``[K]``.

    Up to 14 clients over all minorities; beyond, for each client, over the coalition with and without it.

    Args:
        members: The coalition, bool ``[K]``; see :func:`find_coalition`.
        views: Views of ``K >= 3`` clients.
    """
    K = len(views)
    if K > _EXACT:
        return (margins(members, views) / _TEMPERATURE).sigmoid()
    return (views.minority_scores / _TEMPERATURE).softmax(0) @ minorities(K).double()


def _largest(K: int) -> int:
    return (K - 1) // 2


@lru_cache(maxsize=_EXACT)
def minorities(K: int) -> Tensor:
    """Membership in every set that may be the coalition, bool ``[R, K]``, not to be written to.

    There are about ``2^(K - 1)`` of them.
    """
    sets = itertools.chain.from_iterable(itertools.combinations(range(K), s) for s in range(1, _largest(K) + 1))
    chosen = list(sets)
    members = torch.zeros(len(chosen), K, dtype=torch.bool)
    rows = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(s) for s in chosen]))
    members[rows, torch.tensor(list(itertools.chain.from_iterable(chosen)))] = True
    return members


def _grown(views: Views) -> list[Tensor]:
    """The best sets met while single clients are grown to half of all, by the clients that help most."""
    K = len(views)
    singles = _Sets(torch.eye(K, dtype=torch.bool), views)
    pairs = singles.changed(+1).amax(1)
    starts = pairs.topk(min(_STARTS, K)).indices
    sets = _Sets(singles.members[starts], views)
    best, best_scores = sets.members, sets.scores()
    size = 1
    while size < _largest(K):
        step = min(max(1, size // _STRIDE), _largest(K) - size)
        sets = sets.joined(sets.changed(+1).topk(step).indices)
        size += step
        scores = sets.scores()
        better = scores > best_scores
        best = torch.where(better[:, None], sets.members, best)
        best_scores = torch.where(better, scores, best_scores)
    order = best_scores.argsort(descending=True, stable=True)
    return _distinct(best[order])[:_POLISHED]


def _distinct(sets: Tensor) -> list[Tensor]:
    found: dict[bytes, Tensor] = {}
    for members in sets:
        found.setdefault(members.numpy().tobytes(), members)
    return list(found.values())


def _improved(members: Tensor, views: Views) -> tuple[Tensor, float]:
    """Add, remove or swap the clients that help most, until none do."""
    sets = _Sets(members[None], views)
    score = sets.scores()[0].item()
    while True:
        moved = _moved(sets)
        better = moved.scores()[0].item()
        if better <= score + 1e-9 * abs(score):  # not by rounding alone, or it would never end
            return sets.members[0], score
        sets, score = moved, better


def _moved(sets: _Sets) -> _Sets:
    members, size = sets.members[0], int(sets.members.sum())
    add, remove = sets.changed(+1)[0], sets.changed(-1)[0]
    leave = remove.topk(min(_SWAPPED, size)).indices
    join = add.topk(min(_SWAPPED, len(members) - size)).indices
    swaps = sets.swapped(leave, join)
    moves = {
        swaps.max().item(): [leave[swaps.argmax() // len(join)], join[swaps.argmax() % len(join)]],
        remove.max().item() if size > 1 else -torch.inf: [remove.argmax()],
        add.max().item() if size < _largest(len(members)) else -torch.inf: [add.argmax()],
    }
    for client in moves[max(moves)]:
        sets = sets.flipped(client[None])
    return sets
