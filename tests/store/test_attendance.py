"""Clients who arrive while a round ends."""

from __future__ import annotations

import threading
import time

import torch

from fdcr_fast import UpdateStore

P = 10


class Slow:
    """A sample count that is known when the test says so."""

    def __init__(self):
        self.asked, self.known = threading.Event(), threading.Event()

    def __float__(self):
        self.asked.set()
        assert self.known.wait(60)
        return 1.0


def test_clients_that_begin_the_next_round_together():
    """Of those who wait for a late one of the last round, the first begins the next round, the others join it."""
    store, late = UpdateStore(P, 8, with_fishers=False), Slow()
    store.put(torch.ones(P), None, 1, "before")
    threads = [threading.Thread(target=store.put, args=(torch.ones(P), None, late, "late"))]
    threads[0].start()
    assert late.asked.wait(60)
    store.end_round(["before"])
    outcomes = []
    for client in range(4):
        put = threading.Thread(target=lambda k=client: outcomes.append(store.put(torch.ones(P), None, 1, k)))
        put.start()
        threads.append(put)
    time.sleep(0.05)  # most of them wait now
    late.known.set()
    for thread in threads:
        thread.join(60)
    assert outcomes == [True] * 4
    assert set(store.clients) == {"late", 0, 1, 2, 3}
