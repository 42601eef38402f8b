"""Diagonal Fishers beside a plain gradient and the best peer."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace

import pytest

from benchmarks import peers
from benchmarks.bench_fisher import check_peer, phases, truth
from benchmarks.limits.report import REPORT, at_level, judge, levels
from benchmarks.models import PROBLEMS, problem
from benchmarks.targets import Target

__all__ = ["REPORT"]

GRADIENT = {"LeNet": 0.85, "grouped": 0.85, "transformer": 0.85}  # of a plain gradient's time
PEERS = {"transformer": 1.3}  # of the speed of the best


@pytest.mark.parametrize("start", GRADIENT)
def test_beside_a_gradient(bench, start):
    name = next(name for name in PROBLEMS if name.startswith(start))
    whole, (used, others) = problem(name), levels()
    ours, gradient = peers.ours(whole), peers.batch_gradient(whole)
    contenders = {"ours": ours, "gradient": gradient, **{level: at_level(level, ours) for level in others}}
    found = bench.compare(contenders)
    target, parts = Target(GRADIENT[start], "multiple"), phases(ours)
    judge(bench, f"Fisher, {name}, {used}", None, found, "gradient", target, parts)
    for level in (level for level in others if level != "baseline"):
        times = {"ours": found.times[level], "gradient": found.times["gradient"]}
        judge(bench, f"Fisher, {name}, {level}", None, replace(found, times=times), "gradient", target)


@pytest.mark.parametrize("start", PEERS)
def test_beside_the_best_peer(bench, start):
    warnings.simplefilter("ignore")  # peers' deprecations
    logging.getLogger("opacus").setLevel(logging.ERROR)
    name = next(name for name in PROBLEMS if name.startswith(start))
    whole = problem(name)
    part = whole.part(0, 3)
    expected = truth(part)
    right = {peer: make(whole) for peer, make in peers.PEERS.items() if check_peer(peer, part, expected) is None}
    found = bench.compare({"ours": peers.ours(whole), **right})
    best = min(right, key=lambda peer: found.times[peer].median)
    judge(bench, f"Fisher, {name}, best peer", None, found, best, Target(1 / PEERS[start], "multiple"))
