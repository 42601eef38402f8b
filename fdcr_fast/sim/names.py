"""The names that settings take, and what is said of others.

The names are those of tables whose rows need PyTorch: what the command line says of them does not have to wait for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

NAMES = {
    "attacker_fishers": (
        "honest",
        "random",
        "clean",
        "benign-model",
        "benign-mean",
        "noisy-benign-mean",
        "scaled",
        "constant",
    ),
    "attacker_trainings": ("plain", "constrain-l2", "constrain-cosine", "pgd", "neurotoxin"),
    "attacker_updates": ("plain", "scale", "norm-match", "add-model", "sign-flip", "gaussian", "alie", "ipm"),
    "attacks": ("none", "badnets", "blended", "dba", "edge-case", "label-flip"),
    "clusterings": ("finch", "kmeans", "dbscan"),
    "datasets": ("digits", "fashion-mnist", "mnist", "cifar10", "cifar100", "usps"),
    "discrepancies": ("mse", "l2", "cosine"),
    "informed_baselines": ("oracle",),
    "models": ("auto", "cnn", "mlp", "lenet", "resnet18", "resnet18-gn", "vgg11", "vit"),
    "rules": (
        "fedavg",
        "fdcr",
        "coalition-fdcr",
        "norm-clipping",
        "median",
        "trimmed-mean",
        "krum",
        "multi-krum",
        "geometric-median",
        "bulyan",
        "foolsgold",
        "rlr",
        "dnc",
        "flame",
        "alignins",
        "crfl",
        "multi-metrics",
        "fltrust",
        "finetuning",
        "sageflow",
    ),
    "splits": ("dirichlet", "writer", "dirichlet-mix"),
}


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known name that is most like ``name``, or nothing if none is like it.

    Case does not count, and ``-`` is ``_``.
    """
    plain = {_plain(other): other for other in known}
    return "".join(f"; did you mean {plain[key]!r}?" for key in get_close_matches(_plain(name), plain, n=1))


def check_keys(kind: str, given: object, known: Collection[str]) -> None:
    """Raise ValueError if a mapping has keys that are not known, naming all of them.

    Args:
        kind: What keys are called in the message.
        given: The mapping; anything else, and keys that are not text, are left to others to refuse.
        known: All keys that there are.
    """
    keys = given if isinstance(given, Mapping) else ()
    unknown = [name for name in keys if isinstance(name, str) and name not in known]
    if unknown:
        raise ValueError("\n".join(f"unknown {kind} {name!r}{did_you_mean(name, known)}" for name in unknown))
