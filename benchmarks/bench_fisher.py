"""The diagonal Fisher of seven models: time against a plain batch gradient and peers, exactness, memory.

python -m pytest benchmarks/bench_fisher.py
"""

from __future__ import annotations

import cProfile
import json
import logging
import os
import pstats
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.models import PROBLEMS, Problem, problem
from benchmarks.tables import Report
from fdcr_fast.fisher.graph.gradients import visit_gradients
from fdcr_fast.fisher.layers import RULES
from fdcr_fast.fisher.per_sample import PerSampleGradients

_CHECKED_SAMPLES = 3
_CHECKED_PARTS = 5

REPORT = Report(
    "fisher",
    "Diagonal Fisher",
    "python -m pytest benchmarks/bench_fisher.py",
    """\
Times are medians of interleaved repeats in one process. *plain*: forward and backward pass of the same
batch, the yardstick. *x plain*: our time over that of the plain gradient, with the quartiles of the ratio
within the rounds. *x best*: time of the best correct peer over ours. Peers: time over the plain gradient.
*error*: of ours against one sample at a time in float64, relative in norm, and the largest of any element
above 1e-6 of the largest; the median of five parts of three samples. *float32 error*: largest relative error
in norm of any part, of ours and of one sample at a time in float32: where rounding puts the input of a ReLU on
the other side of zero than in float64, either is off by 1e-4 and more. *extra memory*: growth of the process
beyond that of the forward pass with its activations.""",
)


@dataclass(frozen=True)
class Error:
    """Of a vector against a float64 one: relative in norm, and of every element above 1e-6 of the largest."""

    norm: float
    element: float

    @classmethod
    def of(cls, value: Tensor, truth: Tensor) -> Error:
        difference = (value.double() - truth).abs()
        large = truth > 1e-6 * truth.max()
        return cls((difference.norm() / truth.norm()).item(), (difference / truth)[large].max().item())

    @classmethod
    def of_parts(
        cls, contender: Callable[[Problem], peers.Contender], parts: Sequence[tuple[Problem, Tensor]]
    ) -> list[Error]:
        """Of a contender on several parts of a problem, the smallest first."""
        return sorted((cls.of(contender(part)(), truth) for part, truth in parts), key=lambda error: error.norm)

    @property
    def passes(self) -> bool:
        return self.norm < 1e-5 and self.element < 1e-3


def truth(checked: Problem) -> Tensor:
    """One sample at a time in float64."""
    inputs = checked.inputs.double() if checked.inputs.is_floating_point() else checked.inputs
    before = {name: value.clone() for name, value in checked.model.state_dict().items()}
    try:
        return peers.one_by_one(Problem(checked.name, checked.model.double(), inputs, checked.targets))()
    finally:
        checked.model.float().load_state_dict(before)


def check_peer(name: str, part: Problem, expected: Tensor) -> str | None:
    """Why a peer cannot be compared on this model, or None if it can."""
    try:
        error = Error.of(peers.PEERS[name](part)(), expected)
    except ImportError as failure:
        return f"not installed ({failure.name})"
    except Exception as failure:  # whatever a peer says about what it cannot do
        return str(failure).splitlines()[0]
    return None if error.norm < 1e-3 else f"wrong: relative error {error.norm:.1e}"


def peak_memory(name: str) -> dict[str, int] | None:
    """Peak growth of a fresh process in bytes, see memory.py."""
    if sys.platform != "linux":
        return None
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory.py")), name, str(torch.get_num_threads())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peaks: dict[str, int] = json.loads(run.stdout)
    return peaks


def phases(run: peers.Contender) -> dict[str, float]:
    """Shares of the time of one Fisher."""
    parts: dict[str, list[Callable[..., Any]]] = {
        "backward": [visit_gradients],
        "layer rules": list({rule.sum_squares for rule in RULES.values()}),
        "vmap(grad)": [PerSampleGradients.sum_squares],
    }
    profile = cProfile.Profile()
    profile.runcall(run)
    calls = pstats.Stats(profile)
    total = calls.total_tt  # type: ignore[attr-defined]
    cumulative = {key: row[3] for key, row in calls.stats.items()}  # type: ignore[attr-defined]
    shares = {
        part: sum(cumulative.get((f.__code__.co_filename, f.__code__.co_firstlineno, f.__name__), 0.0) for f in fs)
        / total
        for part, fs in parts.items()
    }
    shares["backward"] -= shares["layer rules"]  # which run inside it
    return {"forward and the rest": 1 - sum(shares.values()), **shares}


@pytest.mark.parametrize("name", PROBLEMS)
def test_fisher(bench, name):
    warnings.simplefilter("ignore")  # peers' deprecations
    logging.getLogger("opacus").setLevel(logging.ERROR)
    whole = problem(name)
    starts = range(0, _CHECKED_PARTS * _CHECKED_SAMPLES, _CHECKED_SAMPLES)
    parts = [(part, truth(part)) for part in (whole.part(first, _CHECKED_SAMPLES) for first in starts)]
    errors, plain_errors = (Error.of_parts(contender, parts) for contender in (peers.ours, peers.one_by_one))
    error = errors[_CHECKED_PARTS // 2]
    assert error.passes, errors
    excluded = {peer: reason for peer in peers.PEERS if (reason := check_peer(peer, *parts[0]))}
    contenders = {peer: make(whole) for peer, make in peers.PEERS.items() if peer not in excluded}
    times = bench.compare({"ours": peers.ours(whole), "plain": peers.batch_gradient(whole), **contenders}).times
    plain, own = times["plain"], times["ours"]
    low, high = own.spread_over(plain)
    best = min(contenders, key=lambda peer: times[peer].median)
    shares = phases(peers.ours(whole))
    memory = peak_memory(name)
    parameters = sum(p.numel() for p in whole.model.parameters())
    cells = {
        "model, batch": name,
        "plain, samples/s": f"{len(whole.targets) / plain.median:,.0f}",
        "ours, samples/s": f"{len(whole.targets) / own.median:,.0f}",
        "x plain": f"**{own.over(plain):.2f}** ({low:.2f} to {high:.2f})",
        "x best": f"**{times[best].over(own):.1f}** ({best})",
        **{peer: f"{times[peer].over(plain):.1f}" if peer in times else excluded[peer] for peer in peers.PEERS},
        "where ours goes": ", ".join(f"{part} {share:.0%}" for part, share in shares.items()),
        "error": f"{error.norm:.0e}, {error.element:.0e}",
        "float32 error": f"{errors[-1].norm:.0e}, {plain_errors[-1].norm:.0e}",
        "extra memory": _memory_cell(memory, parameters),
        "rounds": str(len(own.seconds)),
    }
    figures = {
        "seconds": {peer: t.seconds for peer, t in times.items()},
        "excluded": excluded,
        "shares": shares,
        "errors": [vars(error) for error in errors],
        "one by one errors": [vars(error) for error in plain_errors],
        "parameters": parameters,
        "peak_bytes": memory,
    }
    bench.add(name, cells, figures)


def _memory_cell(peaks: dict[str, int] | None, parameters: int) -> str:
    if peaks is None:
        return "measured on Linux only"
    extra = peaks["fisher"] - peaks["forward"]
    return f"{extra / 2**20:.0f} MiB ({2 * parameters * 4 / 2**20 + 64:.0f} allowed)"
