"""Whom to trust while it is unsure who attacks: few at first, and more as evidence grows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import dot_products
from fdcr_fast.rules.coalition.views import Features
from fdcr_fast.rules.param_groups import ParamGroups

_CORE = 0.3  # share of the clients that is kept in the first rounds
_CORE_ROUNDS = 2
_GROWTH = 0.1  # share of the clients by which the core grows in a round
_OPEN_ROUND = 5  # from which all are kept against whom there is not enough
_CHANCE = 5.6  # J of the best set of n clients that are none, in units of sqrt(n); nobody's largest on digits
_TEMPERATURE = 2.0  # of J as the logarithm of a likelihood
_MOST_SURPLUS = 0.3  # cosine above the median; of digits' honest clients one in a hundred shows more, and none 0.5
_SURPLUS_WEIGHT = 2.0
_COALITION_WEIGHT = 1.5
_ENOUGH = 1.2  # each of the three can be enough alone


def model_agreement(global_params: Tensor, clients: ClientUpdates, groups: ParamGroups, features: Features) -> Tensor:
    """``cos(D_k, w)`` of the valid clients over the features, float64 ``[n]``; 0 for an update or a model of zeros.

    A client whose data the model explains makes it surer of itself, that is longer; one whose data contradict it, such
    as images with a trigger that the model does not know, makes it shorter: of a network without biases whose ``L``
    layers are linear but for ReLUs the derivative of a client's loss along each layer's part of ``w`` is the mean of
    ``z (softmax(z) - y)``, ``z`` the logits and ``y`` the labels, by Euler's theorem for homogeneous functions. The
    head is left out, which follows the client's classes.
    """
    lengths = readings.squared_length(clients.shard, global_params, groups.features).sqrt() * features.length
    return torch.where(lengths > 0, features.along / lengths, 0.0)


def median_alignment(global_params: Tensor, clients: ClientUpdates, groups: ParamGroups, features: Features) -> Tensor:
    """``<D_k, m> / ||D_k||`` of the valid clients over the features, ``m`` the median of every parameter; ``[n]``.

    It takes no model that has learned anything, and no minority turns a median around.
    """
    zeros, middle = torch.zeros_like(global_params), 2 - clients.num_valid % 2
    median = readings.central_mean(zeros, clients, clients.valid, middle, nearest=False)
    along = dot_products(clients, median, groups.features)
    return torch.where(features.length > 0, along / features.length, 0.0)


def believed(agreement: Tensor) -> Tensor:
    """Agreement with the model, float64 ``[n]``, as far as it is believed: ``min(x, m + 0.3) - 2 max(0, x - m - 0.3)``.

    ``m`` is the median. An attacker can have any agreement, by adding a multiple of the model to its update; what no
    client's data make an update speaks against it.
    """
    most = agreement.median() + _MOST_SURPLUS
    return agreement.clamp(max=most) - _SURPLUS_WEIGHT * (agreement - most).clamp(min=0)


def attack_likelihood(score: float, n: int) -> float:
    """How likely the best of all sets of ``n`` clients, whose ``J`` is the score, is more than chance.

    Where nobody attacks, the similarities are nearly those of a random matrix, whose largest eigenvalue grows with
    ``sqrt(n)``, and so does the largest ``J``; that of a coalition grows with ``n``.
    """
    return 1 / (1 + math.exp((_CHANCE * math.sqrt(n) - score) / _TEMPERATURE))


def charges(agreement: Tensor, usual: Tensor, excess: Tensor, coalition: Tensor) -> Tensor:
    """What there is against each client, float64 ``[n]``: ``max(0, 1 - x / usual) + max(0, e) + 1.5 p``.

    None of the three excuses another: an attacker can choose its agreement, by adding a multiple of the model.

    Args:
        agreement: ``x``, mean agreement with the model as far as it is believed, see :func:`believed`, float64 ``[n]``.
        usual: The core's median of it; where that is not positive, agreement tells nothing yet.
        excess: ``e``, mean kurtosis of the features above the median client's, float64 ``[n]``.
        coalition: ``p``, how likely each is in a coalition and that is one, float64 ``[n]``.
    """
    missing = (1 - agreement / usual).clamp(min=0) if usual > 0 else torch.zeros_like(agreement)
    return missing + excess.clamp(min=0) + _COALITION_WEIGHT * coalition


def core(scores: Tensor, round: int) -> Tensor:
    """The clients that are suspected least, bool ``[n]``: 30 % for two rounds, 10 % more in each from there.

    Args:
        scores: How much each client is suspected, float64 ``[n]``.
        round: Number of the round, counted from 1.
    """
    n = len(scores)
    size = min(n, max(1, int(n * (_CORE + _GROWTH * max(0, round - _CORE_ROUNDS)) + 0.5)))
    kept = torch.zeros(n, dtype=torch.bool)
    kept[scores.argsort(stable=True)[:size]] = True
    return kept


def trusted(core: Tensor, charged: Tensor, round: int) -> Tensor:
    """Who is kept, bool ``[n]``: the core, from the third round on without those against whom there is enough.

    From the fifth round on all others are kept, in the core or not. The core is kept where else nobody would be.

    Args:
        core: The core, bool ``[n]``.
        charged: What there is against each client, see :func:`charges`.
        round: Number of the round, counted from 1.
    """
    if round <= _CORE_ROUNDS:
        return core
    cleared = charged <= _ENOUGH
    kept = cleared if round >= _OPEN_ROUND else core & cleared
    return kept if kept.any() else core
