"""Whole rounds beside reads of the same bytes, plain PyTorch, and the Gram's limit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Comparison, Times
from benchmarks.limits.report import REPORT, SHARE, add, at_level, judge, levels
from benchmarks.phases import phases
from benchmarks.plain_rules import PLAIN_RULES, RANDOM, relative_error
from benchmarks.rounds import FDCR_RULE, filled, name_of, require_memory, stacked, stored, sum_of
from benchmarks.rules import ATTACKERS, RULES
from benchmarks.targets import Target
from fdcr_fast import FLAME, AggregationRule, CoalitionFDCR, FedAvg, MultiKrum, UpdateStore
from fdcr_fast.sim.run.simulation import num_threads

__all__ = ["REPORT"]

MILLION, RESNET18 = 1_000_000, 11_000_000  # parameters
NUMBER = 4  # bytes of a float32
SOURCES = ("tensors", "store")
_REPEATS = 3  # of what is watched for its phases
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


def contiguous_sum(size: int) -> Callable[[], Tensor]:
    """A plain read of so many numbers."""
    return torch.zeros(size).add_(1).sum


@pytest.mark.parametrize("by", ["one thread", "all threads"])
def test_machine(bench, sized, by):
    K, P = sized(400, MILLION)
    require_memory(NUMBER * K * P)
    read, count = contiguous_sum(K * P), 1 if by == "one thread" else torch.get_num_threads()
    with num_threads(count):
        found = bench.compare({"raw read": read}, share=0.1)
    seconds = found.times["raw read"]
    rate = f"**{NUMBER * K * P / seconds.median / 1e9:.1f}** GB/s"
    cells = {"ms": f"{1e3 * seconds.median:,.2f}", "measured": rate}
    add(bench, f"raw read, {count} threads", (K, P), cells, {"times": seconds.seconds}, found)


@pytest.mark.parametrize("size", FDCR_STORE, ids=name_of)
def test_fdcr_from_the_store(bench, sized, size):
    target = Target(FDCR_STORE[size])
    K, P = size = sized(*size)
    require_memory(1.1 * UpdateStore.required_bytes(P, K))
    w, _, store = stored(K, P)

    def ours() -> Any:
        return FDCR_RULE.aggregate(w, store)

    used, others = levels()
    contenders = {"ours": ours, "raw read": sum_of(store), **{level: at_level(level, ours) for level in others}}
    found = bench.compare(contenders, SHARE)
    judge(bench, "FDCR, store", size, found, "raw read", target, phases(ours, _REPEATS))
    for level in others:  # the default is the fastest but for noise
        name = f"FDCR, store, {used} beside {level}"
        judge(bench, name, size, found, level, Target(1.05, "multiple"))


@pytest.mark.parametrize("size", FDCR_TENSORS, ids=name_of)
def test_fdcr_from_tensors(bench, sized, size):
    target = Target(FDCR_TENSORS[size])
    K, P = size = sized(*size)
    require_memory(2.1 * NUMBER * K * P)
    w, n, updates, fishers = stacked(K, P)

    def ours() -> Any:
        return FDCR_RULE.aggregate(w, updates, fishers, n)

    found = bench.compare({"ours": ours, "raw read": lambda: (updates.sum(), fishers.sum())}, SHARE)
    judge(bench, "FDCR, tensors", size, found, "raw read", target, phases(ours, _REPEATS))


@pytest.mark.parametrize("size", BFLOAT16, ids=name_of)
def test_bfloat16_store(bench, sized, size):
    K, P = size = sized(*size)
    require_memory(3.3 * NUMBER * K * P)
    w, _, narrow = stored(K, P, torch.bfloat16)
    *_, wide = stored(K, P)

    def ours() -> Any:
        return FDCR_RULE.aggregate(w, narrow)

    found = bench.compare({"ours": ours, "float32": lambda: FDCR_RULE.aggregate(w, wide)}, SHARE)
    judge(bench, "FDCR, bfloat16 store", size, found, "float32", Target(1.6), phases(ours, _REPEATS))


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("size", MEANS_STORE, ids=name_of)
def test_means_from_the_store(bench, sized, size, name):
    K, P = size = sized(*size)
    require_memory(1.1 * UpdateStore.required_bytes(P, K))
    w, _, store = stored(K, P)
    run = partial(MEANS[name].aggregate, w, store)
    found = bench.compare({"ours": run, "raw read": sum_of(store, K * P)}, SHARE)
    judge(bench, f"{name}, store", size, found, "raw read", Target(0.9), phases(run, _REPEATS))


@pytest.mark.parametrize("size", MEANS_TENSORS, ids=name_of)
def test_means_from_tensors(bench, sized, size):
    K, P = size = sized(*size)
    require_memory(2.1 * NUMBER * K * P)
    w, n, updates, _ = stacked(K, P)
    weights = (n / n.sum()).float()
    run = partial(FedAvg().aggregate, w, updates, None, n)
    found = bench.compare({"ours": run, "mv": lambda: torch.mv(updates.t(), weights)}, SHARE)
    judge(bench, "FedAvg, tensors", size, found, "mv", Target(1.0, "multiple"), phases(run, _REPEATS))


@pytest.mark.parametrize("size", PUTS, ids=name_of)
def test_put(bench, sized, size):
    K, P = size = sized(*size)
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

    with num_threads(1):
        found = bench.compare({"ours": put, "copy": copy}, SHARE)
    judge(bench, "put, one thread", size, found, "copy", Target(0.8))


class Whole(NamedTuple):
    size: tuple[int, int]
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]  # w, n, updates, Fishers
    store: UpdateStore

    def run(self, rule: AggregationRule, source: str) -> Callable[[], Any]:
        w, n, updates, fishers = self.tensors
        return partial(rule.aggregate, w, *([self.store] if source == "store" else [updates, fishers, n]))


def whole_round(size: tuple[int, int]) -> Whole:
    K, P = size
    w, n, updates, fishers = stacked(K, P)
    return Whole(size, (w, n, updates, fishers), filled(UpdateStore(P, K), n, updates, fishers))


@pytest.fixture(scope="module", params=WHOLE_ROUNDS, ids=name_of)
def whole(request: pytest.FixtureRequest, sized: Callable[[int, int], tuple[int, int]]) -> Whole:
    K, P = sized(*request.param)
    require_memory(12 * NUMBER * K * P)  # what sorting in PyTorch takes
    return whole_round((K, P))


def test_every_rule_has_plain_code():
    assert PLAIN_RULES.keys() == RULES.keys()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", RULES)
def test_whole_rounds(bench, whole, name, source):
    w, n, updates, fishers = whole.tensors
    f = int(ATTACKERS * len(n))
    rule, plain = RULES[name](f), PLAIN_RULES[name]
    run = whole.run(rule, source)
    if name not in RANDOM:
        assert relative_error(plain(w, updates, fishers, n, f), run().params.double(), w) < 1e-3
    found = bench.compare({"ours": run, "PyTorch": lambda: plain(w, updates, fishers, n, f)}, share=0.1)
    target, row = Target(0.7, "multiple"), f"{name}, {source}, default options"
    judge(bench, row, whole.size, found, "PyTorch", target, phases(run, _REPEATS))


@pytest.fixture(scope="module")
def pairwise(sized: Callable[[int, int], tuple[int, int]]) -> Whole:
    K, P = sized(100, MILLION)
    require_memory(5 * NUMBER * K * P)
    return whole_round((K, P))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", PAIRWISE)
def test_pairwise_rules(bench, pairwise, name, source):
    K, _ = pairwise.size
    updates = pairwise.tensors[2]
    run = pairwise.run(PAIRWISE[name](int(ATTACKERS * K)), source)
    found = bench.compare({"ours": run, "read": updates.sum, "mm": lambda: updates @ updates.t()}, SHARE)
    triangle = (K + 1) / (2 * K)
    pairs = zip(found.times["mm"].seconds, found.times["read"].seconds, strict=True)
    found.times["Gram's limit"] = Times(tuple(max(triangle * mm, read) for mm, read in pairs))
    target = Target(1.3, "multiple")
    judge(bench, f"{name}, {source}", pairwise.size, found, "Gram's limit", target, phases(run, _REPEATS))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", SMALL)
def test_small_federations(bench, name, source):
    whole = whole_round((10, 5_000))
    rule, bound = SMALL[name]
    run = whole.run(rule, source)

    def repeatedly() -> None:
        for _ in range(CALLS):
            run()

    found = bench.compare({f"{CALLS} calls": repeatedly}, share=0.05)
    once = Times(tuple(seconds / CALLS for seconds in found.times[f"{CALLS} calls"].seconds))
    label, target = f"{name}, {source}", Target(bound, "ms")
    judge(bench, label, whole.size, Comparison({label: once}, found.busy), label, target, phases(run, _REPEATS))
