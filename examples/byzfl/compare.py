"""Our aggregation and ByzFL's on the same inputs, under ByzFL's attacks and ours: python examples/byzfl/compare.py

Columns: how far the aggregate lies from the mean of the honest vectors, in units of their standard deviation, and the
time that ByzFL takes over ours. "ours:" attacks are those of the simulator.
"""

from fdcr_fast.integrations.byzfl import Aggregator  # first: without ByzFL it says what to install

# isort: split
import argparse
import statistics
import time

import byzfl
import torch

from fdcr_fast import CoordinateMedian, FedAvg, GeometricMedian, Krum, MultiKrum, TrimmedMean
from fdcr_fast.sim.attacks.updates import ATTACKER_UPDATES, UpdateKnowledge, moments


def ours(name, honest, byzantine):
    """The upload of an attacker of our simulator that sees the honest ones."""
    seen = moments(iter(honest), len(honest[0]))
    known = UpdateKnowledge(
        update=honest[0],
        seen=lambda: seen,
        factor=None,
        **dict.fromkeys(("norm", "benign", "params", "features"), lambda: None),  # for attacks on one rule alone
        clients=len(honest) + byzantine,
        attackers=byzantine,
        generator=torch.Generator().manual_seed(0),
    )
    return [ATTACKER_UPDATES[name](known)] * byzantine


def theirs(name, honest, byzantine):
    """The upload of an attacker of ByzFL."""
    torch.manual_seed(0)
    return byzfl.ByzantineClient({"name": name, "f": byzantine, "parameters": {}}).apply_attack(honest)


def seconds(aggregate, vectors):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        aggregate(vectors)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--byzantine", type=int, default=4)
    parser.add_argument("--dim", type=int, default=10_000)
    given = parser.parse_args()
    f, kept = given.byzantine, given.clients - given.byzantine
    pairs = {
        "mean": (FedAvg(), byzfl.Average()),
        "median": (CoordinateMedian(), byzfl.Median()),
        "trimmed-mean": (TrimmedMean(num_byzantine=f), byzfl.TrMean(f)),
        # ByzFL counts K - f - 1 neighbours, one more than the paper.
        "krum": (Krum(num_byzantine=f), byzfl.Krum(f + 1)),
        "multi-krum": (MultiKrum(num_byzantine=f, num_selected=kept - 1), byzfl.MultiKrum(f + 1)),
        "geometric-median": (GeometricMedian(), byzfl.GeometricMedian(nu=1e-9, T=100)),
    }
    torch.manual_seed(1)
    honest = [1 + torch.randn(given.dim) for _ in range(kept)]
    mean = torch.stack(honest).mean(0)
    attacks = dict.fromkeys(("SignFlipping", "InnerProductManipulation", "ALittleIsEnough", "Gaussian"), theirs)
    attacks |= dict.fromkeys(("sign-flip", "ipm", "alie", "gaussian"), ours)
    print(f"{'attack':26} {'rule':17} {'ours':>9} {'ByzFL':>9} {'time ratio':>10}")
    for attack, upload in attacks.items():
        vectors = honest + upload(attack, honest, f)
        label = attack if upload is theirs else f"ours:{attack}"
        for name, (rule, peer) in pairs.items():
            aggregate = Aggregator(rule)
            far = [((a(vectors) - mean).norm() / given.dim**0.5).item() for a in (aggregate, peer)]
            ratio = seconds(peer, vectors) / seconds(aggregate, vectors)
            print(f"{label:26} {name:17} {far[0]:9.5f} {far[1]:9.5f} {ratio:10.1f}")


if __name__ == "__main__":
    main()
