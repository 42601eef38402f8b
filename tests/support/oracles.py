"""The rules written straight from their papers: float64 NumPy, naive loops, nothing of the package.

Each takes the global parameters ``w [P]``, the updates ``D [K, P]`` and sample counts, and returns the step ``w' - w``.
"""

import numpy as np


def squared_distances(D):
    return np.array([[((a - b) ** 2).sum() for b in D] for a in D])


def krum_scores(D, f):
    between = squared_distances(D)
    neighbours = max(1, len(D) - f - 2)
    return np.array([sorted(np.delete(row, i))[:neighbours] for i, row in enumerate(between)]).sum(1)


def multi_krum(D, f, m):
    chosen = np.argsort(krum_scores(D, f), kind="stable")[:m]
    return D[chosen].mean(0), set(chosen.tolist())


def mean_around_median(column, keep):
    median = np.median(column)
    return np.mean(sorted(column, key=lambda x: abs(x - median))[:keep])


def bulyan(D, f):
    left, chosen, overall = list(range(len(D))), [], krum_scores(D, f)
    while len(chosen) < len(D) - 2 * f:
        scores = krum_scores(D[left], f) if len(left) > 1 else [0]
        best = min(zip(scores, overall[left], left, strict=True))[-1]
        left.remove(best)
        chosen.append(best)
    keep = len(chosen) - 2 * f
    return np.array([mean_around_median(column, keep) for column in D[chosen].T]), set(chosen)


def trimmed_mean(D, f):
    return np.array([np.mean(sorted(column)[f : len(D) - f]) for column in D.T])


def geometric_median(D, n, steps=3000):
    alpha = np.array(n) / sum(n)
    z = alpha @ D
    for _ in range(steps):
        weight = alpha / np.maximum(1e-12, np.linalg.norm(D - z, axis=1))
        z = weight @ D / weight.sum()
    return z


def robust_learning_rate(D, n, threshold):
    mean = np.array(n) / sum(n) @ D
    return np.where(np.abs(np.sign(D).sum(0)) >= threshold, mean, -mean)


def foolsgold(histories):
    """The authors' loops."""
    n = len(histories)
    unit = [h / np.linalg.norm(h) if h.any() else h for h in histories]
    cs = np.array([[a @ b for b in unit] for a in unit])
    np.fill_diagonal(cs, 0)
    maxcs = cs.max(1)
    for i in range(n):
        for j in range(n):
            if i != j and maxcs[i] < maxcs[j]:
                cs[i, j] *= maxcs[i] / maxcs[j]
    wv = np.clip(1 - cs.max(1), 0, 1)
    if wv.max() == 0:
        return wv
    wv = wv / wv.max()
    wv[wv == 1] = 0.99
    with np.errstate(divide="ignore"):
        return np.clip(np.log(wv / (1 - wv)) + 0.5, 0, 1)


def dnc(D, drop):
    """With all parameters in every sample."""
    centred = D - D.mean(0)
    v = np.linalg.svd(centred, full_matrices=False)[2][0]
    scores = (centred @ v) ** 2
    return scores, set(range(len(D))) - set(np.argsort(-scores, kind="stable")[:drop].tolist())


def fltrust(D, own):
    cosine = np.array([d @ own / (np.linalg.norm(d) * np.linalg.norm(own)) for d in D])
    trust = np.maximum(cosine, 0)
    if trust.sum() == 0:
        return 0 * own
    scaled = [np.linalg.norm(own) / np.linalg.norm(d) * d for d in D]
    return sum(t * d for t, d in zip(trust, scaled, strict=True)) / trust.sum()


def model_cosine_distance(w, D):
    models = [w + d for d in D]
    return np.array([[1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in models] for a in models])


def alignins(w, D, share, direction_radius, sign_radius):
    """Cosines, shares of signs, scores, members and the step; for updates whose absolute values all differ."""
    count = max(1, int(share * len(w) + 1e-9))
    principal = np.sign(np.sign(D).sum(0))
    cosine = np.array([d @ w / (np.linalg.norm(d) * np.linalg.norm(w)) for d in D])
    signs = np.empty(len(D))
    for k, d in enumerate(D):
        largest = sorted(range(len(d)), key=lambda v: -abs(d[v]))[:count]
        signs[k] = sum(np.sign(d[v]) == principal[v] for v in largest) / count
    scores = np.zeros(len(D))
    for values, radius in ((cosine, direction_radius), (signs, sign_radius)):
        if values.std() > 1e-12:
            scores = np.maximum(scores, np.abs(values - np.median(values)) / values.std() / radius)
    members = np.flatnonzero(scores <= 1 + 1e-9)
    norms = np.linalg.norm(D, axis=1)
    clipped = [D[k] * min(1, np.median(norms[members]) / norms[k]) for k in members]
    return cosine, signs, scores, set(members.tolist()), np.mean(clipped, axis=0) if clipped else 0 * w


def multi_metrics(w, D):
    """Scores; for regular covariances."""
    models = w + D
    x = np.array(
        [[np.abs(m - w).sum(), np.linalg.norm(m - w), w @ m / (np.linalg.norm(w) * np.linalg.norm(m))] for m in models]
    )
    apart = np.array([sum(np.abs(x[i] - x[j]) for j in range(len(x))) for i in range(len(x))])
    inverse = np.linalg.inv(np.cov(apart.T))
    return np.sqrt([a @ inverse @ a for a in apart])
