"""Send hostile contributions through stores and rules, and require that they hurt nobody else.

    python -m tests.store.fuzz_intake UPDATES [SEED]

Every contribution is accepted or rejected with a reason, every honest one is accepted, no call fails, and every
aggregate is finite.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdcr_fast import FDCR, FedAvg, ParamLayout, UpdateStore
from fdcr_fast.rules.fdcr.clustering import CLUSTERINGS

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 1e-20, 1e3, 1e38, -3e38, 3.4e38, 65504.0, 1e39, 1e300, -1e308]
NOT_FINITE = [math.nan, math.inf, -math.inf]


class Fails:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")

    __array__ = __dlpack__ = __float__ = __index__ = __len__ = __iter__ = __repr__ = property(
        lambda self: self.__getattr__("that")
    )


class Text(str):
    """A string that cannot be shown."""

    __slots__ = ()

    def __str__(self) -> str:
        raise ValueError("not to be shown")


def honest(chance: random.Random, P: int) -> tuple[Any, Any, Any]:
    update = torch.tensor([chance.gauss(0, 1) for _ in range(P)])
    fisher = torch.tensor([chance.random() for _ in range(P)])
    update[0], fisher[0], fisher[-1] = 1.0, 0.0, 1.0
    return update, fisher, chance.randint(1, 100)


def numbers(chance: random.Random, P: int) -> Any:
    """A vector of the right form, with numbers that may be absurd."""
    pool = NUMBERS + (NOT_FINITE if chance.random() < 0.3 else [])
    values = [chance.choice(pool) if chance.random() < 0.5 else chance.gauss(0, 1) for _ in range(P)]
    if chance.random() < 0.2:
        values = [chance.choice(pool)] * P
    if chance.random() < 0.5:
        values = [abs(value) for value in values]
    vector = torch.tensor(values, dtype=torch.float64).to(chance.choice(FLOATS))
    form = chance.randrange(8)
    if form == 0:
        return vector.requires_grad_()
    if form == 1:
        return torch.stack([vector, -vector], 1)[:, 0]
    if form == 2:
        return np.array(values)[::-1]
    if form == 3:
        return np.array(values, dtype=chance.choice([">f4", "<f8", "f2", "g"]))
    if form == 4:
        return vector.detach().float().numpy().tobytes()
    if form == 5:
        return {"a": vector[:1], "b": vector[1:].view(1, -1)}
    return vector


def nonsense(chance: random.Random, P: int) -> Any:
    """Anything."""
    x = torch.tensor([chance.gauss(0, 1) for _ in range(P)])
    return chance.choice(
        [
            lambda: None,
            lambda: 3,
            lambda: "text",
            lambda: Text("text"),
            lambda: [0.0] * P,
            lambda: Fails(),
            lambda: {},
            lambda: {"a": x[:1], "b": x[:1]},
            lambda: {"a": Fails(), "b": None},
            lambda: {1: x},
            lambda: x[: chance.randrange(P)],
            lambda: x.repeat(chance.randint(2, 3)),
            lambda: x.view(1, -1),
            lambda: torch.tensor(1.0),
            lambda: torch.empty(0),
            lambda: x.long(),
            lambda: x.to(torch.complex64),
            lambda: x.bool(),
            lambda: x.to(torch.float8_e5m2),
            lambda: x.to_sparse(),
            lambda: x.to("meta"),
            lambda: np.array([None] * P, dtype=object),
            lambda: np.array(["x"] * P),
            lambda: np.zeros(P, dtype=[("x", "f4")]),
            lambda: np.zeros(P, dtype="datetime64[s]"),
            lambda: np.ma.masked_all(P),
            lambda: np.zeros(P, dtype=np.int8),
            lambda: chance.randbytes(chance.randrange(8 * P)),
            lambda: memoryview(bytes(8 * P))[::2],
            lambda: type("Weird", (torch.Tensor,), {"__torch_function__": classmethod(lambda *_: 7)})(x),
        ]
    )()


def hostile(chance: random.Random, P: int) -> tuple[Any, Any, Any]:
    update, fisher, count = honest(chance, P)
    for _ in range(chance.choice([1, 1, 2, 3])):
        part = chance.randrange(3)
        if part == 0:
            update = numbers(chance, P) if chance.random() < 0.7 else nonsense(chance, P)
        elif part == 1:
            fisher = numbers(chance, P) if chance.random() < 0.7 else nonsense(chance, P)
        else:
            count = chance.choice([*NUMBERS, *NOT_FINITE, 10**18, 10**400, -5, True, np.int8(3), nonsense(chance, 2)])
    return update, fisher, count


def some_rule(chance: random.Random) -> FDCR | FedAvg:
    bound = chance.choice([None, 1.0, 100.0])
    if chance.random() < 0.2:
        return FedAvg(norm_bound=bound)
    return FDCR(
        cluster=chance.choice([None, *CLUSTERINGS]),
        discrepancy=chance.choice(["mse", "l2"]),
        partition=chance.choice(["first", "last", 1]),
        rescale=chance.random() < 0.8,
        importance=chance.random() < 0.8,
        norm_bound=bound,
    )


def one_round(chance: random.Random, folder: Path, seen: Counter[str]) -> int:
    """One round of a few clients; how many contributions they sent."""
    P, clients = chance.randint(2, 12), chance.randint(1, 16)
    on_disk = chance.random() < 0.02
    path = folder / f"{chance.random()}" if on_disk else None
    store = UpdateStore(
        P,
        clients,
        chance.choice(FLOATS),
        tile=chance.choice([None, 1, 3, 64]),
        layout=ParamLayout(("a", "b"), ((1,), (1, P - 1))),
        buffer_dtype=torch.float32,
        path=path,
        sync=False,
    )
    names = [f"client {k}" for k in range(clients)]
    for name in names:
        is_honest = chance.random() < 0.3
        update, fisher, count = (honest if is_honest else hostile)(chance, P)
        accepted = store.put(update, fisher, count, name)
        assert accepted or not is_honest, f"an honest client was rejected: {store.rejected[name]}"
        assert accepted == (name in store.clients) == (name not in store.rejected)
        if not accepted:
            reason = store.rejected[name]
            assert 10 < len(reason) < 400, reason
            seen[reason.split(":")[0][:40]] += 1
        if chance.random() < 0.1:
            assert not store.put(*honest(chance, P), name) or not accepted
    w = torch.tensor([chance.gauss(0, 1) for _ in range(P)])
    result = some_rule(chance).aggregate(w, store, on_empty="keep")
    store.close()
    check(result, w, set(names))
    if len(store) > 0 and not on_disk:  # the same uploads as plain matrices
        updates = torch.stack([kept.update for kept in store])
        fishers = torch.stack([kept.fisher for kept in store])
        for matrix in (updates, fishers):
            if chance.random() < 0.3:
                matrix[chance.randrange(len(matrix)), chance.randrange(P)] = chance.choice([*NOT_FINITE, -1.0])
        counts = [chance.choice([1, 5, 0, -1, 1e18, math.nan, math.inf]) for _ in range(len(updates))]
        result = some_rule(chance).aggregate(w, updates, fishers, counts, on_empty="keep")
        check(result, w, set(range(len(updates))))
    return clients


def check(result: Any, w: torch.Tensor, names: set[Any]) -> None:
    assert result.params.isfinite().all(), result
    assert result.params.dtype == w.dtype
    assert set(result.clients) | set(result.rejected) == names
    rejected = torch.tensor(["second" not in result.rejected.get(name, "second") for name in result.clients]).bool()
    assert not result.kept[rejected].any()
    assert result.weights.isfinite().all()
    assert (result.weights[~result.kept] == 0).all()
    assert not result.kept.any() or math.isclose(result.weights.sum().item(), 1)
    assert not result.scores[~rejected].isinf().any()


def fuzz(updates: int, seed: int) -> Counter[str]:
    """Reasons of rejection, and how often each was given."""
    seen: Counter[str] = Counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of vectors this short, threads are more work than the numbers
    with tempfile.TemporaryDirectory() as folder:
        sent = round_ = 0
        while sent < updates:
            chance = random.Random(f"{seed} {round_}")
            try:
                sent += one_round(chance, Path(folder), seen)
            except BaseException:
                print(f"seed {seed}, round {round_}", file=sys.stderr)
                raise
            round_ += 1
    torch.set_num_threads(threads)
    return seen


if __name__ == "__main__":
    reasons = fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    for reason, times in reasons.most_common():
        print(f"{times:7} {reason}")
    print(f"{sum(reasons.values())} rejections of {sys.argv[1]} contributions, nothing failed")
