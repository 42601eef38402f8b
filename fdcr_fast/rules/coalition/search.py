"""The minority of clients that is most of a coalition, given how clients resemble each other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers: TypeAlias = NDArray[np.float64]
Members: TypeAlias = NDArray[np.bool_]
Indices: TypeAlias = NDArray[np.intp]

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
    def arrays(self) -> tuple[Numbers, Numbers]:
        """``A`` and ``c`` for a search, whose many small steps take NumPy a third of the time."""
        return self.similarity.numpy(), self.concentration.numpy()

    @cached_property
    def rows(self) -> Numbers:
        """Sums of the rows of ``A``."""
        return self.similarity.sum(1).numpy()

    @cached_property
    def totals(self) -> tuple[float, float]:
        """The sum of ``A``, and that of ``c``."""
        return float(self.rows.sum()), float(self.arrays[1].sum())

    @cached_property
    def minority_scores(self) -> Tensor:
        """``J`` of all :func:`minorities`, float64 ``[R]``."""
        return set_scores(minorities(len(self)), self)


class _Sums(NamedTuple):
    """Sums over sets of clients, from which their score follows; a batch of any shape.

    ``a`` is the sum of ``A`` within the set, ``da`` that over its rows, ``c`` that of ``c``.
    """

    size: Numbers
    a: Numbers
    da: Numbers
    c: Numbers


def _score(sums: _Sums, views: Views) -> Numbers:
    s, r = sums.size, len(views) - sums.size
    total_a, total_c = views.totals
    inside = sums.a / np.maximum(s * (s - 1), 1)  # of a single client its similarity to nobody: 0, the mean of A
    across = (sums.da - sums.a) / np.maximum(s * r, 1)
    outside = (total_a - 2 * sums.da + sums.a) / np.maximum(r * (r - 1), 1)
    c = sums.c / np.maximum(s, 1) - (total_c - sums.c) / r
    score: Numbers = np.sqrt(s * r) * (inside - 2 * across + outside + c)
    return score


class _Sets:
    """A batch of sets ``[R, K]`` and, for every client, its similarity to each of them."""

    def __init__(self, members: Members, views: Views, similarity: Numbers | None = None) -> None:
        inside = members.astype(np.float64)
        self.members = members
        self.views = views
        self.similarity = (torch.from_numpy(inside) @ views.similarity).numpy() if similarity is None else similarity
        self.sums = _Sums(
            inside.sum(1),
            (inside * self.similarity).sum(1),
            (inside * views.rows).sum(1),
            (inside * views.arrays[1]).sum(1),
        )

    def scores(self) -> Numbers:
        """``J [R]``."""
        return _score(self.sums, self.views)

    def flipped(self, client: int) -> _Sets:
        """Every set with the client in where it was out, and out where it was in."""
        members = self.members.copy()
        members[:, client] ^= True
        sign = np.where(members[:, client, None], 1.0, -1.0)
        return _Sets(members, self.views, self.similarity + sign * self.views.arrays[0][client])

    def joined(self, clients: Indices) -> _Sets:
        """Every set with its clients of ``clients [R, n]``, which were out, in."""
        members = self.members.copy()
        np.put_along_axis(members, clients, True, 1)
        return _Sets(members, self.views, self.similarity + self.views.arrays[0][clients].sum(1))

    def changed(self, sign: int) -> Numbers:
        """``J [R, K]`` of every set with one client more, or one less; -inf where there is none such."""
        t = self.sums
        sums = _Sums(
            t.size[:, None] + sign,
            t.a[:, None] + 2 * sign * self.similarity,
            t.da[:, None] + sign * self.views.rows,
            t.c[:, None] + sign * self.views.arrays[1],
        )
        return np.where(self.members == (sign < 0), _score(sums, self.views), -np.inf)

    def swapped(self, leave: Indices, join: Indices) -> Numbers:
        """``J [len(leave), len(join)]`` of the first set without a client that leaves and with one that joins."""
        t, (A, c), a = self.sums, self.views.arrays, self.similarity[0]
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
    found, largest = max((_improved(members, views) for members in _grown(views)), key=lambda found: found[1])
    return torch.from_numpy(found), largest


def set_scores(members: Tensor, views: Views) -> Tensor:
    """``J`` of sets, float64 ``[R]``, from membership, bool ``[R, K]``."""
    return torch.from_numpy(_Sets(members.numpy(), views).scores())


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
    coalition = _Sets(members.numpy()[None], views)
    score = coalition.scores()
    less, more = coalition.changed(-1)[0], coalition.changed(+1)[0]
    return torch.from_numpy(np.where(members.numpy(), score - less, more - score))


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


def _largest_of(scores: Numbers, n: int) -> Indices:
    """Where the ``n`` largest of each row are, the first of those that are equal."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :n]


def _grown(views: Views) -> list[Members]:
    """The best sets met while single clients are grown to half of all, by the clients that help most."""
    K = len(views)
    singles = _Sets(np.eye(K, dtype=np.bool_), views)
    starts = _largest_of(singles.changed(+1).max(1), _STARTS)
    sets = _Sets(singles.members[starts], views)
    best, best_scores = sets.members, sets.scores()
    size = 1
    while size < _largest(K):
        step = min(max(1, size // _STRIDE), _largest(K) - size)
        sets = sets.joined(_largest_of(sets.changed(+1), step))
        size += step
        scores = sets.scores()
        better = scores > best_scores
        best = np.where(better[:, None], sets.members, best)
        best_scores = np.where(better, scores, best_scores)
    distinct = {members.tobytes(): members for members in best[_largest_of(best_scores, _STARTS)]}
    return list(distinct.values())[:_POLISHED]


def _improved(members: Members, views: Views) -> tuple[Members, float]:
    """Add, remove or swap the clients that help most, until none do."""
    sets = _Sets(members[None], views)
    score = float(sets.scores()[0])
    while True:
        moved = _moved(sets)
        better = float(moved.scores()[0])
        if better <= score + 1e-9 * abs(score):  # not by rounding alone, or it would never end
            return sets.members[0], score
        sets, score = moved, better


def _moved(sets: _Sets) -> _Sets:
    members = sets.members[0]
    size = int(members.sum())
    add, remove = sets.changed(+1)[0], sets.changed(-1)[0]
    leave = _largest_of(remove, min(_SWAPPED, size))
    join = _largest_of(add, min(_SWAPPED, len(members) - size))
    swaps = sets.swapped(leave, join)
    out, into = np.unravel_index(swaps.argmax(), swaps.shape)
    moves = {
        swaps[out, into]: [leave[out], join[into]],
        remove.max() if size > 1 else -np.inf: [remove.argmax()],
        add.max() if size < _largest(len(members)) else -np.inf: [add.argmax()],
    }
    for client in moves[max(moves)]:
        sets = sets.flipped(int(client))
    return sets
