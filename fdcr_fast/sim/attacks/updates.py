"""What attackers send as their update, once everybody has trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and sample standard deviation of vectors, by coordinate, float64 ``[P]``.

    The deviation of fewer than two vectors is 0, and so is the mean of none.
    """

    mean: Tensor
    std: Tensor


def moments(vectors: Iterable[Tensor], num_params: int) -> Moments:
    """Moments of vectors ``[P]``, read one by one (Welford's recurrence)."""
    mean, squares = torch.zeros(2, num_params, dtype=torch.float64)
    count = 0
    for vector in vectors:
        count += 1
        deviation = vector - mean
        mean += deviation / count
        squares += deviation * (vector - mean)
    return Moments(mean, (squares / max(count - 1, 1)).sqrt())


@dataclass(frozen=True, eq=False)
class UpdateKnowledge:
    """What an attacker's update may depend on.

    Attributes:
        update: What its training led to, ``[P]``.
        seen: Moments of the updates that it sees; called by the names in ``COLLUDING_UPDATES`` alone.
        factor: The attack's parameter; None for its default.
        norm: Norm to be sent; called by ``norm-match`` alone, as it may have to be measured.
        benign: Update of the benign client that it could be, ``[P]``; called by ``add-model`` alone, as it has to be
            trained.
        params: Global parameters as sent out, ``[P]``; called by the same.
        features: Which of them are features, see :class:`fdcr_fast.ParamGroups`, bool ``[P]``; called by the same.
        clients: Number of clients.
        attackers: Number of malicious clients.
        generator: Source of every random draw.
    """

    update: Tensor
    seen: Callable[[], Moments]
    factor: float | None
    norm: Callable[[], float]
    benign: Callable[[], Tensor]
    params: Callable[[], Tensor]
    features: Callable[[], Tensor]
    clients: int
    attackers: int
    generator: torch.Generator

    def factor_or(self, default: float) -> float:
        """The parameter, or its default."""
        return default if self.factor is None else self.factor


def plain(known: UpdateKnowledge) -> Tensor:
    """The update as trained."""
    return known.update


def scale(known: UpdateKnowledge) -> Tensor:
    """Model replacement (Bagdasaryan et al. 2020): the update times ``factor``, by default clients / attackers.

    With equal sample counts and all clients averaged, the default makes the mean of the attackers' models the
    new global model, up to what the others add.
    """
    return known.update * known.factor_or(known.clients / known.attackers)


def norm_match(known: UpdateKnowledge) -> Tensor:
    """The update scaled to a given norm; one of zeros stays one."""
    norm = float(known.update.double().norm())
    return known.update * (known.norm() / norm) if norm > 0 else known.update


def add_model(known: UpdateKnowledge) -> Tensor:
    """The update plus ``factor`` times the features of the global model, for a server that trusts who agrees with it.

    By default the factor is the one that gives the update the cosine with the model, over the features, that the benign
    client's would have which it could be: what :class:`fdcr_fast.CoalitionFDCR` and, over all parameters,
    :class:`fdcr_fast.AlignIns` look at. Nothing is added where no factor does.
    """
    features = known.features()
    model = torch.where(features, known.params().double(), 0.0)
    factor = known.factor
    if factor is None:
        length = model.norm()
        direction = model / length if length > 0 else model

        def split(update: Tensor) -> tuple[Tensor, Tensor]:
            own = torch.where(features, update.double(), 0.0)
            along = own @ direction
            return along, (own - along * direction).norm()

        (along, across), (wanted, beside) = split(known.update), split(known.benign())
        factor = float((across * wanted / beside - along) / length) if min(length, beside) > 0 else 0.0
    return (known.update + factor * model).to(known.update.dtype)


def sign_flip(known: UpdateKnowledge) -> Tensor:
    """``-mean`` (Allen-Zhu et al. 2020; ByzFL's ``SignFlipping``)."""
    return (-known.seen().mean).to(known.update.dtype)


def ipm(known: UpdateKnowledge) -> Tensor:
    """Inner product manipulation, ``-factor mean``, by default 2 (Xie et al. 2020, arXiv:1903.03936; as ByzFL)."""
    return (-known.factor_or(2.0) * known.seen().mean).to(known.update.dtype)


def alie(known: UpdateKnowledge) -> Tensor:
    """A little is enough, ``mean + factor std``, by default 1.5 (Baruch et al. 2019, arXiv:1902.06156; as ByzFL)."""
    seen = known.seen()
    return (seen.mean + known.factor_or(1.5) * seen.std).to(known.update.dtype)


def gaussian(known: UpdateKnowledge) -> Tensor:
    """Normal noise of standard deviation ``factor``, by default 1 (ByzFL's ``Gaussian``)."""
    update = known.update
    return known.factor_or(1.0) * torch.randn(update.shape, generator=known.generator, dtype=update.dtype)


ATTACKER_UPDATES: dict[str, Callable[[UpdateKnowledge], Tensor]] = {
    "plain": plain,
    "scale": scale,
    "norm-match": norm_match,
    "add-model": add_model,
    "sign-flip": sign_flip,
    "gaussian": gaussian,
    "alie": alie,
    "ipm": ipm,
}
COLLUDING_UPDATES = frozenset({"sign-flip", "alie", "ipm"})
