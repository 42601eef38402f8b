from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast import UpdateStore
from fdcr_fast.sim.similarity import importance_similarity


@settings(max_examples=30, deadline=None)
@given(
    num_params=st.integers(2, 40),
    accepted=st.lists(st.booleans(), min_size=1, max_size=6),
    tile=st.integers(1, 48),
    seed=st.integers(0, 100),
)
def test_similarity_is_the_cosine_of_importances(num_params: int, accepted: list[bool], tile: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clients = len(accepted)
    fishers = rng.random((clients, num_params)).astype(np.float32)
    store = UpdateStore(num_params, clients, tile=tile)
    store._rows.data.fill_(float("nan"))
    for client, good in enumerate(accepted):
        update = np.full(num_params, 1.0 if good else np.nan, dtype=np.float32)
        assert store.put(update, fishers[client], 1, client_id=client) == good
    similarity = importance_similarity(store.client_updates(), range(clients)).numpy()
    exact = fishers.astype(np.float64)
    for i in range(clients):
        for j in range(clients):
            a, b = ((f - f.min()) / (f.max() - f.min()) for f in (exact[i], exact[j]))
            expected = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
            expected = expected if accepted[i] and accepted[j] else np.nan
            np.testing.assert_allclose(similarity[i, j], expected, rtol=1e-9)


def test_similarity_needs_fishers() -> None:
    with pytest.raises(ValueError, match="no Fishers"):
        importance_similarity(UpdateStore(3, 2, with_fishers=False).client_updates(), [0, 1])
