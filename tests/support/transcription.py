"""The rule written straight from the paper's formulas: float64, naive loops, nothing of the package."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import assume


def finch_levels(values):
    """All FINCH partitions from the finest, each a list of sets of indices, in exact arithmetic."""
    clusters = [[i] for i in sorted(range(len(values)), key=lambda i: values[i])]
    levels = []
    while len(clusters) > 1:
        means = [sum(Fraction(float(values[i])) for i in c) / len(c) for c in clusters]
        nearest = [
            min((abs(means[i] - means[j]), j) for j in range(len(means)) if j != i)[1] for i in range(len(means))
        ]
        component = list(range(len(clusters)))
        for i, j in enumerate(nearest):
            old, new = component[i], component[j]
            component = [new if c == old else c for c in component]
        clusters = [
            [k for i, members in enumerate(clusters) if component[i] == c for k in members]
            for c in dict.fromkeys(component)
        ]
        levels.append([set(c) for c in clusters])
    return levels or [[{0}]]


def finch(values, partition):
    levels = finch_levels(values)
    several = [level for level in levels if len(level) > 1] or levels[:1]
    index = {"first": 0, "last": len(several) - 1}.get(partition, partition)
    return several[min(index, len(several) - 1)]


def two_means(values):
    """The best split of the sorted values by trying each one in exact arithmetic."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    if values[order[0]] == values[order[-1]]:
        return [set(order)]

    def spread(members):
        exact = [Fraction(float(values[i])) for i in members]
        mean = sum(exact) / len(exact)
        return sum((v - mean) ** 2 for v in exact)

    _, split = min((spread(order[:s]) + spread(order[s:]), s) for s in range(1, len(order)))
    return [set(order[:split]), set(order[split:])]


def labels_of(clusters, values):
    """Number clusters by ascending mean."""
    labels = np.empty(len(values), dtype=np.int64)
    for label, members in enumerate(sorted(clusters, key=lambda c: np.mean([float(values[i]) for i in c]))):
        labels[list(members)] = label
    return labels


def importance_of(F):
    low, high = min(F), max(F)
    return [(f - low) / (high - low) for f in F]  # 6


def fdcr(
    w,
    updates,
    fishers,
    n,
    *,
    discrepancy="mse",
    cluster="finch",
    partition="first",
    rescale=True,
    importance=True,
    learning_rate=1.0,
    compared=None,
):
    """Algorithm 1: new parameters, V, kept clients, labels, weights; equation numbers as in the paper."""
    K, P = len(updates), len(w)
    delta = [[float(x) for x in row] for row in updates]
    I = [importance_of([float(f) for f in F]) for F in fishers]  # noqa: E741
    alpha = [float(x) / float(sum(n)) for x in n]
    factor = I if importance else [[1.0] * P] * K
    u_k = [[delta[k][v] / learning_rate * factor[k][v] for v in range(P)] for k in range(K)]  # 7, 8
    u = [math.fsum(alpha[k] * u_k[k][v] for k in range(K)) for v in range(P)]  # 9a
    some = range(P) if compared is None else compared  # the paper compares all parameters
    S = [math.fsum((u[v] - u_k[k][v]) ** 2 for v in some) for k in range(K)]
    if discrepancy == "cosine":  # not in the paper
        a = np.array(u)[some]
        lengths = [alpha[k] * np.linalg.norm(np.array(u_k)[k, some]) for k in range(K)]
        assume(np.linalg.norm(a) >= 0.1 * sum(lengths))  # its square is known to 12 decimals
        cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in np.array(u_k)[:, some]]
        V = 1 - np.round(cosines, 12)  # as it is decided what are the same directions
    else:
        V = np.array([s / len(some) if discrepancy == "mse" else math.sqrt(s) for s in S])  # 9b
    if cluster is None:
        labels = np.zeros(K, dtype=np.int64)
    else:
        labels = labels_of(finch(V, partition) if cluster == "finch" else two_means(V), V)
    kept = [labels.max() == 0 or labels[k] < labels.max() for k in range(K)]  # 10
    total = sum(alpha[k] for k in range(K) if kept[k])
    weights = np.array([alpha[k] / total if kept[k] else 0.0 for k in range(K)])  # 11
    params = [
        math.fsum(
            weights[k] * (float(w[v]) + (2 / (1 + math.exp(-I[k][v])) if rescale else 1) * delta[k][v])  # 12
            for k in range(K)
        )
        for v in range(P)
    ]
    return np.array(params), V, np.array(kept), labels, weights
