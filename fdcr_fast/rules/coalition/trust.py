"""Whom to trust while it is unsure who attacks: few at first, and more as evidence grows."""

from __future__ import annotations

import torch
from torch import Tensor

from fdcr_fast.round import readings
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.columns import dot_products, squared_length
from fdcr_fast.rules.coalition.views import Features
from fdcr_fast.rules.param_groups import ParamGroups

_CORE = 0.3  # share of the clients that is kept in the first rounds
_CORE_ROUNDS = 2
_GROWTH = 0.1  # share of the clients by which the core may grow in a round
_UNANIMITY_ROUND = 5  # from which all are kept where all agree
_LEAST_AGREEMENT = 0.2  # of the core's median, for who is in no coalition
_MORE_AGREEMENT = 0.3  # for who certainly is in one


def model_agreement(global_params: Tensor, clients: ClientUpdates, groups: ParamGroups, features: Features) -> Tensor:
    """``cos(D_k, w)`` of the valid clients over the features, float64 ``[n]``; 0 for an update or a model of zeros.

    A client whose data the model explains makes it surer of itself, that is longer; one whose data contradict it, such
    as images with a trigger that the model does not know, makes it shorter: of a network without biases whose ``L``
    layers are linear but for ReLUs the derivative of a client's loss along each layer's part of ``w`` is the mean of
    ``z (softmax(z) - y)``, ``z`` the logits and ``y`` the labels, by Euler's theorem for homogeneous functions. The
    head is left out, which follows the client's classes.
    """
    known = _features_alone(global_params, clients, groups)
    lengths = clients.shard.sum_vector(known, squared_length).sqrt().cpu() * features.length
    return torch.where(lengths > 0, dot_products(clients, known) / lengths, 0.0)


def median_alignment(global_params: Tensor, clients: ClientUpdates, groups: ParamGroups, features: Features) -> Tensor:
    """``<D_k, m> / ||D_k||`` of the valid clients over the features, ``m`` the median of every parameter; ``[n]``.

    It takes no model that has learned anything, and no minority turns a median around.
    """
    zeros, middle = torch.zeros_like(global_params), 2 - clients.num_valid % 2
    median = readings.central_mean(zeros, clients, clients.valid, middle, nearest=False)
    along = dot_products(clients, _features_alone(median, clients, groups))
    return torch.where(features.length > 0, along / features.length, 0.0)


def _features_alone(vector: Tensor, clients: ClientUpdates, groups: ParamGroups) -> Tensor:
    """A vector of the parameters that are here with zeros where no features are."""
    alone, first = torch.zeros_like(vector), clients.shard.first
    for part in groups.features:
        here = slice(max(part.start - first, 0), max(part.stop - first, 0))
        alone[here] = vector[here]
    return alone


def trusted(scores: Tensor, membership: Tensor, agreement: Tensor | None, round: int) -> Tensor:
    """Who is kept, bool ``[n]``: a core, without those who agree too little with the model.

    The core are the ``m`` clients that are suspected least, ``m`` being 30 % of all for two rounds, and 10 % more in
    each round from there. Once it grows, those are dropped whose agreement is below ``0.2 + 0.3 p_k`` times the core's
    median (or, where that is negative, below it): who looks like a coalition must agree more. From the fifth round on,
    if that is nobody of all clients, all are kept.

    Args:
        scores: How much each client is suspected, float64 ``[n]``.
        membership: ``p_k``, how likely each is in a coalition, float64 ``[n]``.
        agreement: Mean agreement with the model, see :func:`model_agreement`; None in the first round.
        round: Number of the round, counted from 1.
    """
    n = len(scores)
    size = min(n, max(1, int(n * (_CORE + _GROWTH * max(0, round - _CORE_ROUNDS)) + 0.5)))
    kept = torch.zeros(n, dtype=torch.bool)
    kept[scores.argsort(stable=True)[:size]] = True
    if agreement is None or round <= _CORE_ROUNDS:
        return kept
    median = agreement[kept].median()
    least = (_LEAST_AGREEMENT + _MORE_AGREEMENT * membership) * median
    agrees = agreement >= torch.minimum(least, median)
    nobody_attacks = round >= _UNANIMITY_ROUND and bool(agrees.all())
    return agrees if nobody_attacks else kept & agrees
