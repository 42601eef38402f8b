"""Aggregation beside what limits it: every target with its verdict, and the phases of the rounds that miss theirs.

python -m pytest benchmarks/bench_limits.py
python -m pytest benchmarks/bench_limits.py --refuse-busy    # fails instead of recording rows of a busy machine
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.harness import RESULTS, Machine, Report, Times, interleave
from benchmarks.machine import Load, caches, watched
from benchmarks.phases import phases, shares
from benchmarks.plain_rules import PLAIN_RULES, RANDOM, relative_error
from benchmarks.rounds import FDCR_RULE, filled, require_memory, stacked, stored, sum_of
from benchmarks.rules import ATTACKERS, RULES
from benchmarks.targets import Target, summary, verdict
from fdcr_fast import FLAME, AggregationRule, CoalitionFDCR, FedAvg, MultiKrum, UpdateStore, _native

MILLION, RESNET18 = 1_000_000, 11_000_000  # parameters
NUMBER = 4  # bytes of a float32
COLUMNS = ("", "K", "P", "ms", "measured", "of", "target", "verdict", "phases", "busy", "rounds")
CALLS = 20  # of a rule, timed together where one takes less than a millisecond

FDCR_STORE = {
    (10, MILLION): 0.6,
    (100, MILLION): 0.85,
    (1000, MILLION): 0.9,
    (10, RESNET18): 0.85,
    (20, RESNET18): 0.85,
}
FDCR_TENSORS = {(20, RESNET18): 0.5, (100, MILLION): 0.5, (1000, MILLION): 0.4}  # Fishers are read twice
MEANS_STORE = [(10, MILLION), (20, RESNET18), (100, MILLION), (1000, MILLION)]
MEANS_TENSORS = [(10, MILLION), (20, RESNET18)]
BFLOAT16 = [(100, MILLION), (20, RESNET18)]
PUTS = [(10, MILLION), (100, MILLION), (20, RESNET18)]
WHOLE_ROUNDS = [(10, MILLION), (20, RESNET18), (100, MILLION)]
PAIRWISE: dict[str, Callable[[int], AggregationRule]] = {
    "CoalitionFDCR": lambda f: CoalitionFDCR(start="bold"),
    "FLAME": lambda f: FLAME(),
    "MultiKrum": lambda f: MultiKrum(num_byzantine=f),
}
SMALL: dict[str, tuple[AggregationRule, float]] = {
    "FDCR": (FDCR_RULE, 0.3),
    "FedAvg": (FedAvg(), 0.1),
    "CoalitionFDCR": (CoalitionFDCR(start="bold"), 3),
}
MEANS = {"FedAvg": FedAvg(), "norm clipping": FedAvg(clip="median")}

REPORT = Report(
    "limits",
    "Limits of aggregation",
    "python -m pytest benchmarks/bench_limits.py",
    f"""\
Caches: {caches()}. Float32, one client in ten an attacker; FDCR with two-means, but beside PyTorch all rules with their
default options. *measured*: speed of a whole ``aggregate`` as a share of the yardstick's, or its time as a multiple:
median and quartiles of the ratios within interleaved repeats in one process. Yardsticks: a *raw read* is ``torch.sum``,
a plain SIMD sum, over as many bytes as the rule needs; *mv* is ``torch.mv(D.t(), w)``; *PyTorch* the shortest code that
does the same without any check (``benchmarks/plain_rules.py``); the *Gram's limit* the larger of reading the updates
and the share of one triangle, ``(K + 1) / 2K``, of the time of ``x @ x.T``. *phases*: of a round by itself, those of a
hundredth or more. *busy*: cores that others kept busy, or half the distance of the quartiles of the yardstick's times,
where either is large.""",
    summary,
)


class Comparison(NamedTuple):
    times: dict[str, Times]
    load: Load


@dataclass(frozen=True)
class Bench:
    seconds: float
    quick: bool
    refuse_busy: bool
    say: Callable[[str], None]

    def size(self, K: int, P: int) -> tuple[int, int]:
        return (min(K, 12), min(P, 20_000)) if self.quick else (K, P)

    def compared(self, contenders: Mapping[str, Callable[[], Any]], share: float = 0.25) -> Comparison:
        """Interleaved times, for so much of the seconds that a comparison may take, and the load meanwhile."""
        with watched() as load:
            times = interleave(contenders, share * self.seconds)
        return Comparison(times, load)

    def row(
        self,
        name: str,
        size: tuple[int, int],
        comparison: Comparison,
        ours: str,
        yardstick: str,
        target: Target,
        run: Callable[[], Any] | None = None,
    ) -> None:
        """Judges one contender by another, or by itself; with its phases if it is given to be run for them."""
        own, other = comparison.times[ours], comparison.times[yardstick]
        value, low, high = target.measured(own, other)
        parts = {} if run is None else phases(run, repeats=3)
        excess = target.excess(value)
        cells = {
            "ms": f"{1e3 * own.median:,.2f}",
            "measured": f"**{value:.2f}** ({low:.2f} to {high:.2f})",
            "of": "" if ours == yardstick else yardstick,
            "target": str(target),
            "verdict": verdict(excess, parts),
            "phases": shares(parts),
        }
        times = {name: comparison.times[name].seconds for name in (ours, yardstick)}
        figures = {"excess": excess, "phases": parts, "times": times}
        self.add(name, size, cells, figures, comparison.load, other)

    def add(
        self,
        name: str,
        size: tuple[int, int],
        cells: Mapping[str, str],
        figures: Mapping[str, Any],
        load: Load,
        yardstick: Times,
    ) -> None:
        K, P = size
        busy = load.verdict(yardstick.spread)
        rounds = str(len(yardstick.seconds))
        row = dict.fromkeys(COLUMNS, "") | {
            "": name,
            "K": str(K),
            "P": f"{P:,}",
            **cells,
            "busy": busy,
            "rounds": rounds,
        }
        self.say(", ".join(f"{column} {cell}".strip() for column, cell in row.items() if cell))
        if busy and self.refuse_busy:
            pytest.fail(f"not recorded, the machine is busy: {busy}")
        REPORT.add(f"{name}, K = {K}, P = {P:,}", row, {**figures, "busy": busy})


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    options, capture = request.config.option, request.config.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{text}", end="", flush=True)

    if options.quick and options.results == RESULTS:  # which are of real sizes
        Report.folder = tmp_path_factory.mktemp("results")
    if options.refuse_busy:
        with watched() as load:
            time.sleep(1)
        if busy := load.verdict(spread=0.0):
            pytest.exit(f"the machine is busy: {busy}", returncode=1)
    yield Bench(0.05 if options.quick else options.seconds, options.quick, options.refuse_busy, say)
    say(REPORT.closing())


def contiguous_sum(size: int) -> Callable[[], Tensor]:
    """A plain read of so many numbers."""
    return torch.zeros(size).add_(1).sum


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def at_level(level: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """The same with the kernels of another instruction set."""
    native = _native.module
    assert native is not None

    def other() -> None:
        before = native.simd_level()
        native.set_simd_level(level)
        try:
            run()
        finally:
            native.set_simd_level(before)

    return other


def test_machine(bench):
    bench.say(f"{asdict(Machine.this())}, caches: {caches()}")
    K, P = bench.size(400, MILLION)
    require_memory(NUMBER * K * P)
    read = contiguous_sum(K * P)

    def by(count: int) -> None:
        with threads(count):
            read()

    counts = dict.fromkeys([1, torch.get_num_threads()])
    times, load = bench.compared({str(count): partial(by, count) for count in counts})
    for count, seconds in times.items():
        rate = f"**{NUMBER * K * P / seconds.median / 1e9:.1f}** GB/s"
        cells = {"ms": f"{1e3 * seconds.median:,.2f}", "measured": rate}
        bench.add(f"raw read, {count} threads", (K, P), cells, {"times": seconds.seconds}, load, seconds)


@pytest.mark.parametrize("size", FDCR_STORE)
def test_fdcr_from_the_store(bench, size):
    target = Target(FDCR_STORE[size])
    K, P = size = bench.size(*size)
    require_memory(1.1 * UpdateStore.required_bytes(P, K))
    w, _, store = stored(K, P)

    def ours() -> Any:
        return FDCR_RULE.aggregate(w, store)

    native = _native.module
    others = [level for level in native.cpu_features() if level != native.simd_level()] if native else []
    contenders = {"raw read": sum_of(store), "ours": ours, **{level: at_level(level, ours) for level in others}}
    found = bench.compared(contenders)
    bench.row("FDCR, store", size, found, "ours", "raw read", target, ours)
    for level in others:  # the default is the fastest but for noise
        name = f"FDCR, store, {native.simd_level()} beside {level}"
        bench.row(name, size, found, "ours", level, Target(1.05, "multiple"))


@pytest.mark.parametrize("size", FDCR_TENSORS)
def test_fdcr_from_tensors(bench, size):
    target = Target(FDCR_TENSORS[size])
    K, P = size = bench.size(*size)
    require_memory(2.1 * NUMBER * K * P)
    w, n, updates, fishers = stacked(K, P)

    def ours() -> Any:
        return FDCR_RULE.aggregate(w, updates, fishers, n)

    found = bench.compared({"raw read": lambda: (updates.sum(), fishers.sum()), "ours": ours})
    bench.row("FDCR, tensors", size, found, "ours", "raw read", target, ours)


@pytest.mark.parametrize("size", BFLOAT16)
def test_bfloat16_store(bench, size):
    K, P = size = bench.size(*size)
    require_memory(3.3 * NUMBER * K * P)
    w, _, narrow = stored(K, P, torch.bfloat16)
    *_, wide = stored(K, P)

    def ours() -> Any:
        return FDCR_RULE.aggregate(w, narrow)

    found = bench.compared({"float32": lambda: FDCR_RULE.aggregate(w, wide), "ours": ours})
    bench.row("FDCR, bfloat16 store", size, found, "ours", "float32", Target(1.6), ours)


@pytest.mark.parametrize("size", MEANS_STORE)
def test_means_from_the_store(bench, size):
    K, P = size = bench.size(*size)
    require_memory(1.1 * UpdateStore.required_bytes(P, K))
    w, _, store = stored(K, P)
    contenders = {name: partial(rule.aggregate, w, store) for name, rule in MEANS.items()}
    found = bench.compared({"raw read": sum_of(store, K * P), **contenders})
    for name, run in contenders.items():
        bench.row(f"{name}, store", size, found, name, "raw read", Target(0.9), run)


@pytest.mark.parametrize("size", MEANS_TENSORS)
def test_means_from_tensors(bench, size):
    K, P = size = bench.size(*size)
    require_memory(2.1 * NUMBER * K * P)
    w, n, updates, _ = stacked(K, P)
    weights = (n / n.sum()).float()
    run = partial(FedAvg().aggregate, w, updates, None, n)
    found = bench.compared({"mv": lambda: torch.mv(updates.t(), weights), "ours": run})
    bench.row("FedAvg, tensors", size, found, "ours", "mv", Target(1.0, "multiple"), run)


@pytest.mark.parametrize("size", PUTS)
def test_put(bench, size):
    K, P = size = bench.size(*size)
    clients = min(K, 10)
    require_memory(1.1 * UpdateStore.required_bytes(P, K) + 3 * NUMBER * clients * P)
    store, rows, sent = UpdateStore(P, K), torch.empty(clients, 2, P), torch.rand(2, P)

    def put() -> None:
        store.clear()
        for _ in range(clients):
            store.put(sent[0], sent[1], 1)

    def copy() -> None:
        for row in rows:
            row.copy_(sent)

    with threads(1):
        found = bench.compared({"copy": copy, "ours": put})
    bench.row("put, one thread", size, found, "ours", "copy", Target(0.8))


class Whole(NamedTuple):
    size: tuple[int, int]
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # w, n, updates, Fishers
    store: UpdateStore


@pytest.fixture(scope="module", params=WHOLE_ROUNDS, ids=lambda size: f"{size[0]}x{size[1]}")
def whole(request: pytest.FixtureRequest, bench: Bench) -> Whole:
    K, P = bench.size(*request.param)
    require_memory(12 * NUMBER * K * P)  # what sorting in PyTorch takes
    w, n, updates, fishers = stacked(K, P)
    return Whole((K, P), (w, n, updates, fishers), filled(UpdateStore(P, K), n, updates, fishers))


def test_every_rule_has_plain_code():
    assert PLAIN_RULES.keys() == RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_whole_rounds(bench, whole, name):
    w, n, updates, fishers = whole.tensors
    f = int(ATTACKERS * len(n))
    rule, plain = RULES[name](f), PLAIN_RULES[name]
    params = rule.aggregate(w, updates, fishers, n).params.double()
    if name not in RANDOM:
        assert relative_error(plain(w, updates, fishers, n, f), params, w) < 1e-3
    runs = {
        "tensors": lambda: rule.aggregate(w, updates, fishers, n),
        "store": lambda: rule.aggregate(w, whole.store),
    }
    found = bench.compared({"PyTorch": lambda: plain(w, updates, fishers, n, f), **runs}, share=0.1)
    for ours in runs:
        target = Target(0.7, "multiple")
        bench.row(f"{name}, {ours}, default options", whole.size, found, ours, "PyTorch", target, runs[ours])


def test_pairwise_rules(bench):
    K, P = size = bench.size(100, MILLION)
    require_memory(5 * NUMBER * K * P)
    w, n, updates, fishers = stacked(K, P)
    store = filled(UpdateStore(P, K), n, updates, fishers)
    contenders: dict[str, Callable[[], Any]] = {
        "read": updates.sum,
        "mm": lambda: updates @ updates.t(),
    }
    rounds: dict[str, Callable[[], Any]] = {}
    for name, make in PAIRWISE.items():
        rule = make(int(ATTACKERS * K))
        rounds[f"{name}, tensors"] = partial(rule.aggregate, w, updates, fishers, n)
        rounds[f"{name}, store"] = partial(rule.aggregate, w, store)
    times, load = bench.compared({**contenders, **rounds}, share=0.5)
    triangle = (K + 1) / (2 * K)
    pairs = zip(times["mm"].seconds, times["read"].seconds, strict=True)
    times["Gram's limit"] = Times(tuple(max(triangle * mm, read) for mm, read in pairs))
    for name, run in rounds.items():
        bench.row(name, size, Comparison(times, load), name, "Gram's limit", Target(1.3, "multiple"), run)


def repeatedly(run: Callable[[], Any]) -> None:
    for _ in range(CALLS):
        run()


def test_small_federations(bench):
    K, P = size = 10, 5_000
    w, n, updates, fishers = stacked(K, P)
    store = filled(UpdateStore(P, K), n, updates, fishers)
    runs: dict[str, Callable[[], Any]] = {}
    for name, (rule, _) in SMALL.items():
        runs[f"{name}, tensors"] = partial(rule.aggregate, w, updates, fishers, n)
        runs[f"{name}, store"] = partial(rule.aggregate, w, store)
    found, load = bench.compared({name: partial(repeatedly, run) for name, run in runs.items()})
    times = {name: Times(tuple(s / CALLS for s in t.seconds)) for name, t in found.items()}
    for name, run in runs.items():
        _, bound = SMALL[name.split(",")[0]]
        bench.row(name, size, Comparison(times, load), name, name, Target(bound, "ms"), run)
