"""The same round over 1, 2 and 3 processes, each with some of the parameters of all clients."""

import os
import runpy
import signal
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fdcr_fast
from fdcr_fast import (
    CRFL,
    FDCR,
    FLAME,
    RLR,
    AggregationRule,
    Bulyan,
    CoalitionFDCR,
    CoalitionState,
    CoordinateMedian,
    DnC,
    FedAvg,
    FoolsGold,
    GeometricMedian,
    Krum,
    MultiKrum,
    MultiMetrics,
    ParamGroups,
    ParamShard,
    Selection,
    TrimmedMean,
    UpdateStore,
)
from fdcr_fast.distributed import param_shard as sharded
from tests.support.ranks import PerRank, started

# Plain PyTorch sums in another order, and takes minutes.
pytestmark = pytest.mark.skipif(not fdcr_fast.backends()["cpu"].usable, reason="bits are those of the kernels")


P, K = 6 * 4096 + 123, 12  # seven blocks, which neither two nor three ranks share equally


RULES = {
    "fedavg": FedAvg,
    "clipped": partial(FedAvg, clip="median", max_weight_share=0.2),
    "fdcr": FDCR,
    "fdcr-kmeans": partial(FDCR, cluster="kmeans", discrepancy="l2"),
    "fdcr-plain": partial(FDCR, importance=False, rescale=False),
    "fdcr-head": partial(
        FDCR, discrepancy="cosine", parameters="head", groups=ParamGroups((slice(P - 9000, P),), (slice(0, 9),))
    ),
    "coalition": partial(
        CoalitionFDCR, groups=ParamGroups((slice(P - 9000, P),), (slice(10, 3000), slice(4000, P - 9000)))
    ),
    "coalition-later": lambda: CoalitionFDCR(
        groups=ParamGroups((slice(P - 9000, P),), (slice(10, 3000), slice(4000, P - 9000))),
        state=CoalitionState(rounds=1),  # from the second round on it looks at the global parameters
    ),
    "krum": partial(Krum, num_byzantine=2),
    "multi-krum": partial(MultiKrum, num_byzantine=2),
    "bulyan": partial(Bulyan, num_byzantine=2),
    "geometric-median": GeometricMedian,
    "median": CoordinateMedian,
    "trimmed": partial(TrimmedMean, num_byzantine=2),
    "rlr": partial(RLR, threshold=4),
    "multi-metrics": MultiMetrics,
    "dnc": partial(DnC, num_byzantine=2, sample=1000),
    "flame": FLAME,
    "crfl": CRFL,
}


@dataclass
class Problem:
    """A round in which three clients attack."""

    w: torch.Tensor
    updates: torch.Tensor
    fishers: torch.Tensor
    n: list

    @classmethod
    def make(cls, seed=0, num_params=P, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        updates = 0.01 * torch.randn(K, num_params, generator=generator)
        updates[:3] += 0.02 * torch.randn(num_params, generator=generator)
        fishers = torch.rand(K, num_params, generator=generator).square()
        w = torch.randn(num_params, generator=generator)
        return cls(w, updates.to(dtype), fishers.to(dtype), [10.0 * k + 3 for k in range(K)])

    def store(self, params=slice(None), **options):
        w = self.w[params]
        store = UpdateStore(len(w), K, self.updates.dtype, **options)
        for k in range(K):
            store.put(self.updates[k, params], self.fishers[k, params], self.n[k], f"client-{k}")
        return store


def aggregate(group, problem, rule, source, path=None):
    """The result and the whole parameters, as every rank has them."""
    shard = ParamShard(len(problem.w), group)
    own = shard.params
    if source == "store":
        path = None if path is None else f"{path}-{shard.world}-{shard.rank}"
        with problem.store(own, path=path) as store:
            result = rule.aggregate(problem.w[own], store, shard=shard)
    else:
        result = rule.aggregate(
            problem.w[own], problem.updates[:, own], problem.fishers[:, own], problem.n, shard=shard
        )
    assert torch.equal(shard.gather(result.params)[own], result.params)
    decided = result.weights, result.scores, result.kept, result.labels, result.rejected, result.explanation
    return shard.gather(result.params), *decided


def same(a, b):
    return all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def test_the_table_has_every_rule_that_takes_shards():
    exported = {x for x in vars(fdcr_fast).values() if isinstance(x, type) and issubclass(x, AggregationRule)}
    assert {type(make()) for make in RULES.values()} == {rule for rule in exported if rule.sharded}


@pytest.mark.parametrize("source", ["store", "tensors"])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_the_same_bits_on_any_number_of_ranks(ranks, name, source):
    problem = Problem.make()
    alone, *_ = ranks.call(1, aggregate, problem, RULES[name](), source)
    for size in (2, 3):
        for result in ranks.call(size, aggregate, problem, RULES[name](), source):
            assert same(result, alone), (size, name)
    rule = RULES[name]()
    whole = (
        rule.aggregate(problem.w, problem.store())
        if source == "store"
        else rule.aggregate(problem.w, problem.updates, problem.fishers, problem.n)
    )
    params, weights, discrepancy, kept, labels, *_ = alone
    assert torch.equal(kept, whole.kept)
    assert torch.equal(labels, whole.labels)
    torch.testing.assert_close(weights, whole.weights, rtol=1e-12, atol=0)
    torch.testing.assert_close(discrepancy, whole.scores, rtol=1e-9, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(params, whole.params, rtol=0, atol=2.4e-7)
    if name.startswith("fdcr"):
        assert torch.equal(params, whole.params)
        assert torch.equal(discrepancy, whole.scores)


def with_few_sums(group, problem, rule, room):
    """As if the sums of blocks took much memory: neighbours are added before they are sent, ranks send in turn."""
    before = sharded._SUMS_BYTES
    sharded._SUMS_BYTES = room
    try:
        return aggregate(group, problem, rule, "store")
    finally:
        sharded._SUMS_BYTES = before


def test_sums_that_are_added_before_they_are_sent_have_the_same_bits_too(ranks):
    problem = Problem.make(dtype=torch.float64)  # float32 sums are often exact
    other_bits = []  # than by the usual order; by chance one of the rules may have the same on some processors
    for rule, room in ((FDCR(), 2 * 8 * (2 * K + 1)), (GeometricMedian(), 100)):
        alone, *_ = ranks.call(1, with_few_sums, problem, rule, room)
        other_bits.append(not same(alone, ranks.call(1, aggregate, problem, rule, "store")[0]))
        for size in (2, 3):
            assert all(same(result, alone) for result in ranks.call(size, with_few_sums, problem, rule, room))
    assert any(other_bits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_files_and_other_dtypes(ranks, dtype, tmp_path):
    problem = Problem.make(2, dtype=dtype)
    whole = FDCR().aggregate(problem.w, problem.store())
    for size in (1, 3):
        for result in ranks.call(size, aggregate, problem, FDCR(), "store", tmp_path / "round"):
            assert same(result[:3], (whole.params, whole.weights, whole.scores))


@pytest.mark.parametrize("num_params", [3, 1000])
def test_models_with_fewer_blocks_than_ranks(ranks, num_params):
    problem = Problem.make(3, num_params)
    whole = FDCR().aggregate(problem.w, problem.store())
    for params, _, discrepancy, kept, *_ in ranks.call(3, aggregate, problem, FDCR(), "store"):
        assert torch.equal(kept, whole.kept)
        assert torch.equal(params, whole.params)
        torch.testing.assert_close(discrepancy, whole.scores, rtol=1e-13, atol=0)


def example(group):
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "sharded_server.py"))["serve"](group)


def test_the_example_drops_the_attackers_on_any_number_of_ranks(ranks):
    kept, params = ranks.call(1, example)[0]
    assert kept.tolist() == [False] * 4 + [True] * 16
    assert all(torch.equal(found, params) for _, found in ranks.call(3, example))


# --- clients that do not arrive, or not alike, at all ranks


def bad_round(group, problem, rule, order, on_invalid="reject"):
    """Clients come in another order on every rank, and some of them only in part."""
    shard = ParamShard(len(problem.w), group)
    own, last = shard.params, shard.rank == shard.world - 1
    store = UpdateStore(len(problem.w[own]), K + 6)
    for k in order:
        store.put(problem.updates[k, own], problem.fishers[k, own], problem.n[k], f"client-{k}")
    part = torch.ones(len(problem.w[own]))
    store.put(torch.where(part > 0, torch.nan if last else 1.0, part), part.cumsum(0), 5, "nan in the last shard")
    store.put(part, -part if shard.rank == 0 else part, 5, "negative Fisher in the first shard")
    store.put(part, part, 5, "constant Fisher")
    store.put(part * 1e6, part.cumsum(0), 5, "far too long")
    if shard.world > 1:
        store.put(part, part.cumsum(0), 5 + shard.rank, "different counts")
        if last:
            store.put(part, part.cumsum(0), 5, "only the last shard")
    result = rule.aggregate(problem.w[own], store, on_invalid=on_invalid, shard=shard)
    return shard.gather(result.params), result.scores, result.clients, result.rejected


@pytest.mark.parametrize("rule", [FDCR(), FedAvg(clip="median"), FLAME(norm_bound=100)], ids=repr)
def test_a_client_counts_if_all_ranks_can_use_it(ranks, rule):
    problem, order = Problem.make(1), list(range(K))
    mixed = PerRank([order, order[::-1], order[5:] + order[:5]])
    alone, *_ = ranks.call(1, bad_round, problem, rule, order)
    for size in (2, 3):
        results = ranks.call(size, bad_round, problem, rule, mixed)
        assert all(same(result[:3], alone[:3]) for result in results)
        rejected = results[-1][3]
        assert all(result[3] == rejected for result in results)
        assert rejected.pop("different counts") == "it told the ranks different sample counts"
        assert rejected.pop("only the last shard") == "its part for rank 0 did not arrive"
        assert rejected["nan in the last shard"] == "the update is not finite, or too large to be squared in float64"
        assert rejected["negative Fisher in the first shard"] == "the Fisher has negative entries, the smallest is -1"
        assert set(rejected) == set(alone[3])
    errors = ranks.errors(2, bad_round, problem, rule, mixed, "raise")
    assert errors[0] == errors[1]
    assert "only the last shard" in errors[0][1]


# --- calls that do not fit together


def call(group, problem, rule, params=None, **changes):
    shard = ParamShard(params or len(problem.w), group)
    own = shard.params
    given = {"num_samples": problem.n, "client_ids": list(range(K)), "clients": K, "on_invalid": "reject", **changes}
    n = given.pop("clients")
    given["num_samples"], given["client_ids"] = given["num_samples"][:n], given["client_ids"][:n]
    fishers = problem.fishers[:n, own] if given.pop("fishers", True) else None
    result = rule.aggregate(problem.w[own], problem.updates[:n, own], fishers, shard=shard, **given)
    return shard.gather(result.params)


def mismatched(group, problem, rules, changes):
    return call(group, problem, rules, **changes)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("client_ids", {"clients": K - 1}),
        ("client_ids", {"client_ids": list(range(1, K + 1))}),
        ("num_samples", {"num_samples": [1.0] * K}),
        ("num_params", {"params": P - 4096}),
        ("on_invalid", {"on_invalid": "raise"}),
        ("importances: fishers must be given", {"fishers": False}),
    ],
)
def test_ranks_that_are_called_differently_all_fail(ranks, name, changed):
    problem = Problem.make()
    for kind, message in ranks.errors(3, mismatched, problem, FDCR(), PerRank([{}, changed, {}])):
        assert kind == "ValueError"
        assert name in message


def test_ranks_with_different_rules_all_fail_and_go_on_afterwards(ranks):
    problem = Problem.make()
    rules = PerRank([FDCR(), FDCR(), FDCR(cluster="kmeans")])
    for _, message in ranks.errors(3, mismatched, problem, rules, {}):
        assert message.startswith("the ranks were called with different rule: rank 0 has FDCR(")
    for _, message in ranks.errors(3, mismatched, problem, FoolsGold(), {}):
        assert "FoolsGold needs all parameters in one process" in message
    ranks.call(3, mismatched, problem, FDCR(), {})


@dataclass(frozen=True)
class Secretive(AggregationRule):
    """Keeps whom ``keep`` says, which the ranks do not compare; None kills the process."""

    sharded = True
    keep: int | None = field(repr=False)

    def select(self, clients):
        if self.keep is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return Selection(torch.arange(K) == self.keep)


def test_ranks_that_decide_differently_all_fail(ranks):
    for kind, message in ranks.errors(2, mismatched, Problem.make(), PerRank([Secretive(0), Secretive(1)]), {}):
        assert kind == "RuntimeError"
        assert "different decisions" in message


# --- ranks that are not there


def impatient(group, problem, rule, seconds):
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
    return call(group, problem, rule) if rule is not None else None


def test_a_rank_that_does_not_come_or_dies_is_an_error_on_the_others(tmp_path):
    problem = Problem.make()
    with started(tmp_path) as ranks:
        ranks.start(2, impatient, problem, PerRank([FDCR(), None]), 1)  # the second one does something else
        good, (kind, message) = ranks.result(0)
        assert not good
        assert kind == "RuntimeError"
        assert message.startswith("rank 0 of 2 cannot go on: another rank died, or did not get here within the timeout")
        assert ranks.result(1) == (True, None)
        ranks.start(3, impatient, problem, PerRank([Secretive(0), Secretive(None), Secretive(0)]), 200)
        for rank in (0, 2):
            good, (kind, message) = ranks.result(rank)
            assert not good
            assert kind == "RuntimeError"
            assert message.startswith(f"rank {rank} of 3 cannot go on: another rank died")
        ranks.processes[1].join()
        assert ranks.processes[1].exitcode == -signal.SIGKILL
