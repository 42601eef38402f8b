"""Every rule as the shortest plain PyTorch that does the same to ``[K, P]`` tensors, without any check.

What a rule does with ``K`` or ``K x K`` numbers, which takes no time here, is the library's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdcr_fast import ModelQuality
from fdcr_fast.rules.coalition.search import Views, find_coalition
from fdcr_fast.rules.coalition.views import standard_scores, standardised
from fdcr_fast.rules.fdcr.clustering import finch
from fdcr_fast.rules.pairwise.flame import majority_cluster
from fdcr_fast.rules.pairwise.foolsgold import foolsgold_weights
from fdcr_fast.rules.pairwise.multi_metrics import whitened_scores

# Of ``w [P]``, ``D [K, P]``, ``F [K, P]``, sample counts ``n [K]`` in float64 and a number of attackers.
PlainRule = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def mean(w: Tensor, D: Tensor, weights: Tensor) -> Tensor:
    return w + torch.mv(D.t(), weights.float())


def over(w: Tensor, D: Tensor, kept: Tensor) -> Tensor:
    """The mean over the kept clients, all alike."""
    return mean(w, D, kept / kept.sum())


def fedavg(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    return mean(w, D, n / n.sum())


def clipped(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    norms = D.norm(dim=1)
    return mean(w, D, n / n.sum() * (norms.median() / norms).clamp(max=1))


def fdcr(w: Tensor, D: Tensor, F: Tensor, n: Tensor, cluster: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """New parameters and V; all clients at once, products with vectors where there are any."""
    low, high = (f.unsqueeze(1) for f in F.aminmax(dim=1))
    importance = (F - low) / (high - low)
    u_k = importance * D
    V = ((n / n.sum()).float() @ u_k - u_k).square_().mean(1)
    labels = cluster(V)
    kept = torch.where(labels < labels.max(), n, 0)
    return w + (kept / kept.sum()).float() @ importance.sigmoid_().mul_(2).mul_(D), V


def coalition(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    mean_fisher = torch.mv(F.t(), 1 / F.sum(1)) / len(F)
    squares = D.square()
    q = squares / (mean_fisher + 0.01 * mean_fisher.mean())
    kurtosis = torch.log(q.square().mean(1) / q.mean(1).square())
    head = torch.log(squares @ mean_fisher / squares.sum(1))
    x = D * (mean_fisher / mean_fisher.mean()) ** 0.25
    cosine = cosines(x @ x.t())
    rows = cosine.mean(0)
    centred = cosines(cosine - rows - rows[:, None] + rows.mean())
    concentration = standard_scores(standard_scores(head.double()) + standard_scores(kurtosis.double()))
    dropped, _ = find_coalition(Views(standardised(standardised(centred.double())), 0.3 * concentration))
    kept = torch.where(dropped, 0, n)
    return mean(w, D, kept / kept.sum())


def cosines(gram: Tensor) -> Tensor:
    lengths = gram.diagonal().sqrt()
    return gram / lengths / lengths[:, None]


def median(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    # PyTorch's median is the lower of the two middle values; here it is their mean.
    K = len(D)
    return w + (D.median(0).values if K % 2 else D.sort(0).values[K // 2 - 1 : K // 2 + 1].mean(0))


def trimmed_mean(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    return w + D.sort(0).values[f : len(D) - f].mean(0)


def squared_distances(D: Tensor) -> Tensor:
    gram = D @ D.t()
    squares = gram.diagonal()
    return squares + squares[:, None] - 2 * gram


def krum_scores(distances: Tensor, f: int) -> Tensor:
    return distances.sort(1).values[:, 1 : max(2, len(distances) - f - 1)].sum(1)


def krum(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    return w + D[krum_scores(squared_distances(D), f).argmin()]


def multi_krum(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    kept = torch.zeros(len(D))
    kept[krum_scores(squared_distances(D), f).argsort()[: len(D) - f]] = 1
    return over(w, D, kept)


def bulyan(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    f //= 2
    distances = squared_distances(D)
    left = krum_scores(distances, f).argsort()  # of equal scores, as of the last two, the one that is first here wins
    selected = []
    while len(selected) < len(D) - 2 * f:
        best = krum_scores(distances[left][:, left], f).argmin() if len(left) > 1 else torch.tensor(0)
        selected.append(left[best])
        left = left[torch.arange(len(left)) != best]
    chosen = D[torch.stack(selected)]
    middle = chosen.sort(0).values[(len(chosen) - 1) // 2 : len(chosen) // 2 + 1].mean(0)
    nearest = (chosen - middle).abs().argsort(0)[: len(chosen) - 2 * f]
    return w + chosen.gather(0, nearest).mean(0)


def geometric_median(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    squares = squared_distances(D).double().clamp(min=0)
    alpha = weights = n / n.sum()
    for _ in range(1000):
        to_all = squares @ weights
        new = alpha / (to_all - weights @ to_all / 2).sqrt()
        new /= new.sum()
        change, weights = (new - weights).abs().sum(), new
        if change <= 1e-12:
            break
    return mean(w, D, weights)


def robust_learning_rate(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    step = torch.mv(D.t(), (n / n.sum()).float())
    return w + torch.where(D.sign().sum(0).abs() >= f + 1, step, -step)


def foolsgold(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    history = torch.zeros_like(D).add_(D)  # the round is added to earlier ones
    weights, _ = foolsgold_weights(cosines(history @ history.t()))
    return over(w, D, weights)


def divide_and_conquer(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    kept = torch.ones(len(D))
    for _ in range(5):
        sample = D[:, torch.randint(len(w), (min(10_000, len(w)),))]
        centred = sample - sample.mean(0)
        direction = torch.linalg.eigh(centred @ centred.t()).eigenvectors[:, -1]
        kept[direction.square().argsort(descending=True)[:f]] = 0
    return over(w, D, kept)


def flame(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    models, norms = w + D, D.norm(dim=1)
    kept, bound = majority_cluster(1 - cosines(models @ models.t())), norms.quantile(0.5)
    params = mean(w, D, kept / kept.sum() * (bound / norms).clamp(max=1))
    return params + 0.001 * bound * torch.randn(len(w))


def crfl(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    params = fedavg(w, D, F, n, f)
    return params * (15 / params.norm()).clamp(max=1) + 0.01 * torch.randn(len(w))


def multi_metrics(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    w64, D64 = w.double(), D.double()  # whitening makes what float32 rounds a hundred thousand times as large
    cosine = torch.nn.functional.cosine_similarity(w64, w64 + D64, dim=1)
    scores = whitened_scores(torch.stack([D64.abs().sum(1), D64.norm(dim=1), cosine], 1))
    kept = torch.zeros_like(n)
    chosen = scores.argsort()[: max(1, int(0.3 * len(D) + 1e-9))]
    kept[chosen] = n[chosen]
    return mean(w, D, kept / kept.sum())


def fltrust(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    own = torch.ones_like(w)
    norms = D.norm(dim=1)
    trust = (torch.mv(D, own) / (norms * own.norm())).clamp(min=0)
    return mean(w, D, trust / trust.sum() * own.norm() / norms)


def alignins(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    norms = D.norm(dim=1)
    direction = (D @ w / (norms * w.norm())).double()
    largest, signs = D.abs().topk(int(0.3 * len(w))).indices, D.sign()
    aligned = (signs.gather(1, largest) == signs.sum(0).sign()[largest]).double().mean(1)
    kept = _usual(direction) & _usual(aligned)
    return mean(w, D, kept / kept.sum() * (norms[kept].quantile(0.5) / norms).clamp(max=1))


def _usual(x: Tensor) -> Tensor:
    return (x - x.quantile(0.5)).abs() <= x.std(correction=0) * (1 + 1e-9)


def sageflow(w: Tensor, D: Tensor, F: Tensor, n: Tensor, f: int) -> Tensor:
    qualities = [_quality(w + d) for d in D]
    kept = torch.tensor([k / q.loss if q.entropy <= 1 else 0 for k, q in zip(n.tolist(), qualities, strict=True)])
    return mean(w, D, kept / kept.sum())


def _quality(params: Tensor) -> ModelQuality:
    return ModelQuality(0.5, 1.0)


# By the names of bench_rules, whose options these are.
PLAIN_RULES: dict[str, PlainRule] = {
    "FedAvg": fedavg,
    "FedAvg, clipped": clipped,
    "FDCR": lambda w, D, F, n, f: fdcr(w, D, F, n, finch)[0],
    "CoalitionFDCR": coalition,
    "CoordinateMedian": median,
    "TrimmedMean": trimmed_mean,
    "Krum": krum,
    "MultiKrum": multi_krum,
    "Bulyan": bulyan,
    "GeometricMedian": geometric_median,
    "RLR": robust_learning_rate,
    "FoolsGold": foolsgold,
    "DnC": divide_and_conquer,
    "FLAME": flame,
    "AlignIns": alignins,
    "CRFL": crfl,
    "MultiMetrics": multi_metrics,
    "FLTrust": fltrust,
    "Finetuning": fedavg,
    "Sageflow": sageflow,
}
# What these draw is different every time.
RANDOM = {"DnC", "FLAME", "CRFL"}


def relative_error(value: Tensor, expected: Tensor, origin: Tensor | float = 0.0) -> float:
    return ((value.double() - expected).norm() / (expected - origin).norm()).item()
