"""Rules on tensors of a device: the same results as on the CPU, and how often the host waits for it.

Run by test_on_device.py in a process of its own, in which PyTorch is made to know the device.
"""

from dataclasses import replace

import pytest
import torch

import fdcr_fast
from fdcr_fast import _native
from fdcr_fast.rules.fdcr import clustering as cluster
from fdcr_fast.store import pinned_rows as pinned
from tests.support.gpu.cases import CASES
from tests.support.remote_device import DEVICE, Device, streams

K, P = 12, 20_000


def round_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    updates = torch.randn(K, P, generator=generator) * 0.01
    fishers = torch.rand(K, P, generator=generator)
    fishers[:3] = torch.randn(3, P, generator=generator).abs()
    w = torch.randn(P, generator=generator)
    return w, updates.to(dtype), fishers.to(dtype), torch.arange(1.0, K + 1)


def there(tensor):
    return tensor.to(DEVICE, non_blocking=True)


# Sums of PyTorch's own, which stand in for the kernels where these are not compiled, end in other bits in other memory.
ROUNDING = 0 if _native.loaded else 1e-12


def same(result, expected):
    assert result.rejected == expected.rejected
    for name in ("weights", "discrepancy", "kept", "labels"):
        assert getattr(result, name).device.type == "cpu"
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=ROUNDING, atol=0, equal_nan=True
        )
    assert result.params.device == DEVICE
    torch.testing.assert_close(result.params.local, expected.params, rtol=1e5 * ROUNDING, atol=1e5 * ROUNDING)


RULES = [
    fdcr_fast.FedAvg(), fdcr_fast.FedAvg(clip="median", max_weight_share=0.1), fdcr_fast.FDCR(),
    fdcr_fast.FDCR(cluster="kmeans", max_weight_share=0.1), fdcr_fast.FDCR(cluster="dbscan", discrepancy="l2"),
    fdcr_fast.FDCR(partition="last"), fdcr_fast.FDCR(cluster=None),
]  # fmt: skip


# Those that compare all clients look at K x K numbers.
MORE = [
    (fdcr_fast.CoordinateMedian(), 1), (fdcr_fast.TrimmedMean(num_byzantine=2), 1), (fdcr_fast.RLR(threshold=3), 1),
    (fdcr_fast.MultiKrum(num_byzantine=2), 2), (fdcr_fast.Bulyan(num_byzantine=2), 2), (fdcr_fast.FoolsGold(), 2),
    (fdcr_fast.GeometricMedian(), 2), (fdcr_fast.FLAME(), 6), (fdcr_fast.MultiMetrics(), 4),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_host_waits_once_for_tensors(rule):
    w, updates, fishers, counts = round_of()
    expected = rule.aggregate(w, updates, fishers, counts)
    with Device() as device:
        result = rule.aggregate(there(w), there(updates), there(fishers), counts)
        assert len(device.waits) == 1, device.waits
        same(result, expected)


@pytest.mark.parametrize(("rule", "waits"), [*((rule, 1) for rule in RULES), *MORE], ids=repr)
def test_and_for_a_store(rule, waits):
    w, updates, fishers, _ = round_of()
    with Device() as device:
        stores = [fdcr_fast.UpdateStore(P, K + 1, device=place) for place in ("cpu", DEVICE)]
        for store in stores:
            for k in range(K):
                store.put(updates[k], fishers[k], k + 1)
        expected = rule.aggregate(w, stores[0])
        device.waits.clear()
        result = replace(rule).aggregate(there(w), stores[1])
        assert len(device.waits) <= waits, device.waits
        same(result, expected)


@pytest.mark.parametrize("span_bytes", [1, 1 << 20])
@pytest.mark.parametrize(
    ("rule", "waits"),
    [
        (RULES[1], 1),
        (fdcr_fast.FDCR(), 1),
        (fdcr_fast.CoordinateMedian(), 1),
        (fdcr_fast.MultiKrum(num_byzantine=2), 2),
    ],
    ids=repr,
)
def test_a_store_in_pinned_memory_streams(rule, waits, span_bytes, monkeypatch):
    """To the same bits, without more waits; the device refuses copies that overtake what reads, and the reverse."""
    monkeypatch.setattr(pinned, "_SPAN_BYTES", span_bytes)
    w, updates, fishers, _ = round_of()
    with Device() as device:
        stores = [fdcr_fast.UpdateStore(P, K + 1, tile=4096), fdcr_fast.UpdateStore(P, K + 1, compute_device=DEVICE)]
        for store in stores:
            store.put(updates[0], fishers[0], 1.0, "leaves")
            for k in range(K):
                store.put(updates[k], fishers[k], k + 1)
            store.remove("leaves")
        expected = rule.aggregate(w, stores[0])
        tiles = stores[1].client_updates().tiles
        side, spans = tiles._side, list(tiles.spans())
        assert [span.first for span in spans] == list(range(0, P, {1: 4096, 1 << 20: 2 * 4096}[span_bytes]))
        assert sum(span.num_params for span in spans) == P
        device.waits.clear()
        result = replace(rule).aggregate(there(w), stores[1])
        assert len(device.waits) <= waits, device.waits
        same(result, expected)
        before = side.synchronized
        assert stores[1].put(updates[0], fishers[0], 1.0, "again")
        assert side.synchronized > before, "rows are overwritten while they are copied"
        assert torch.equal(stores[1]["again"].update, updates[0])


def test_overtaking_is_noticed():
    with Device():
        x, side = there(torch.ones(3)), streams.Stream()
        with pytest.raises(RuntimeError, match="overtakes"), streams.stream(side):
            x + x
        streams.forget()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_store_is_not_pinned_for_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be pinned for cuda: no cuda device is available"):
        fdcr_fast.UpdateStore(10, 2, compute_device="cuda")
    for options in ({"path": tmp_path / "store"}, {"shared": True}, {"device": "meta"}):
        with pytest.raises(ValueError, match="compute_device of its own"):
            fdcr_fast.UpdateStore(10, 2, compute_device="cuda", **options)


def test_the_coalition_rule_works_on_a_device():
    w, updates, fishers, counts = round_of()
    expected = fdcr_fast.CoalitionFDCR().aggregate(w, updates, fishers, counts)
    with Device():
        same(fdcr_fast.CoalitionFDCR().aggregate(there(w), there(updates), there(fishers), counts), expected)


def test_whoever_cannot_be_used_is_rejected():
    w, updates, fishers, counts = round_of()
    updates[1, 777], fishers[2, 5], counts[3] = torch.nan, -1.0, 0
    updates[4] *= 1e6
    for rule in (fdcr_fast.FedAvg(norm_bound=10.0), fdcr_fast.FDCR()):
        expected = rule.aggregate(w, updates, fishers, counts)
        assert set(expected.rejected) == ({1, 2, 3, 4} if rule.needs_fishers else {1, 3, 4})
        with Device() as device:
            same(rule.aggregate(there(w), there(updates), there(fishers), counts), expected)
            assert len(device.waits) <= 4, device.waits  # a reading in each precision, statistics, and the reading
            with pytest.raises(ValueError, match="global_params are not finite"):
                rule.aggregate(there(w) / 0, there(updates), there(fishers), counts)


def test_a_second_reading_is_one_more_wait():
    w, updates, fishers, counts = round_of()
    updates[:] = updates[0] * (1 + 1e-6 * torch.rand(K, 1))  # products of float32 do not tell these apart
    fishers[:] = fishers[0]
    expected = fdcr_fast.FDCR().aggregate(w, updates, fishers, counts)
    with Device() as device:
        same(fdcr_fast.FDCR().aggregate(there(w), there(updates), there(fishers), counts), expected)
        assert len(device.waits) == 2, device.waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.cpu(),
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: torch.ones(3).to(DEVICE),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_waiting_is_noticed(wait):
    with Device() as device:
        x = there(torch.ones(3))
        assert not device.waits
        wait(x)
        assert device.waits
        with pytest.raises(RuntimeError, match="and on the CPU"):
            x + torch.ones(3)


@pytest.mark.parametrize("function", [cluster.finch, cluster.kmeans, cluster.dbscan])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 50])
def test_clustering_does_not_wait(function, size):
    values = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    for given in (values, values * 0, (values * 3).round()):
        with Device() as device:
            labels = function(there(given))
            assert not device.waits
            assert torch.equal(labels.local, function(given))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_are_launched_without_waiting(case, monkeypatch):
    kernels = pytest.importorskip("fdcr_fast.ops.triton", reason="the package triton is not installed")
    launched = []
    monkeypatch.setattr(kernels.launch, "run", lambda *args: launched.append(args))

    def make(*shape, dtype=torch.float32):
        return there(torch.rand(1).to(dtype)).expand(shape)  # of these sizes, but without the memory

    with Device() as device:
        args = case.arguments(make)
        getattr(kernels, case.operator)(*args)
        assert launched
        assert not device.waits, device.waits
