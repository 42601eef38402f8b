"""Kill a process many times while it changes a store in a file, and look at what is left each time.

    python -m tests.store.kill_puts KILLS FOLDER

Each child opens the store, says which change it begins and which has returned, and is killed at a random moment.
Children are forks of this process, which uses one thread only.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import torch

from fdcr_fast import UpdateStore

P, CAPACITY = 9000, 8
EVENT = struct.Struct("<cii")  # b"begin" or b"end", client, version (0: removed)


def vectors(client: int, version: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * client + version)
    return torch.randn(P, generator=generator), torch.rand(P, generator=generator)


def change_until_killed(path: Path, seed: int, say: int) -> None:
    chance = random.Random(seed)
    store = UpdateStore.open(path, "r+")
    while True:
        client = chance.randrange(CAPACITY)
        version = 0 if client in store and chance.random() < 0.5 else chance.randrange(1, 1000)
        if client not in store and len(store) == CAPACITY - 1:  # a replacement needs a free row
            continue
        os.write(say, EVENT.pack(b"b", client, version))
        if version == 0:
            store.remove(client)
        else:
            assert store.put(*vectors(client, version), version, client, replace=True)
        os.write(say, EVENT.pack(b"e", client, version))


def one_kill(path: Path, seed: int, expected: dict[int, int]) -> dict[int, int]:
    """What the store holds after one more child, from what it held before."""
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            change_until_killed(path, seed, say)
        finally:
            os._exit(1)
    os.close(say)
    chance = random.Random(seed)
    with os.fdopen(hear, "rb") as pipe:
        heard = pipe.read(EVENT.size * chance.randint(1, 5))  # so far it comes on the slowest machine, too
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child failed by itself"
        heard += pipe.read()
    open_change = None
    for event, client, version in EVENT.iter_unpack(heard[: len(heard) // EVENT.size * EVENT.size]):
        open_change = (client, version) if event == b"b" else None
        if event == b"e":
            expected[client] = version
    held = dict.fromkeys(range(CAPACITY), 0)
    with UpdateStore.open(path, verify=True) as store:
        for kept in store:
            version = int(kept.num_samples)
            update, fisher = vectors(kept.client, version)
            assert torch.equal(kept.update, update), f"the update of client {kept.client} is not what was put"
            assert torch.equal(kept.fisher, fisher), f"the Fisher of client {kept.client} is not what was put"
            held[kept.client] = version
    for client in range(CAPACITY):
        allowed = {expected.get(client, 0)}
        if open_change is not None and open_change[0] == client:
            allowed.add(open_change[1])
        assert held[client] in allowed, f"client {client} has version {held[client]}, expected one of {allowed}"
    return held


def main(kills: int, folder: Path) -> None:
    torch.set_num_threads(1)  # the children of a process with a thread pool could not use it
    path = folder / "killed.store"
    UpdateStore(P, CAPACITY, path=path, tile=1024, max_resident=1 << 22).close()
    held: dict[int, int] = {}
    changes = 0
    for seed in range(kills):
        before = held
        held = one_kill(path, seed, dict(held))
        changes += held != before
    print(f"{kills} kills, the store differed after {changes} of them, and was right after all")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
