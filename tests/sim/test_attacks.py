from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast.sim.attacks import ATTACKER_FISHERS, ATTACKS, PAPER_TRIGGER, BadNets, random_fisher


def test_the_papers_trigger_sets_twelve_pixels_of_every_channel() -> None:
    images = torch.rand(5, 3, 8, 9) - 0.5
    stamped = BadNets(target=2, poison_share=0.5).stamp(images)
    for row in range(8):
        for column in range(9):
            marked = row in (0, 2) and column in (0, 1, 2, 4, 5, 6)
            expected = torch.ones(5, 3) if marked else images[:, :, row, column]
            assert torch.equal(stamped[:, :, row, column], expected), (row, column)
    assert len(PAPER_TRIGGER) == 12


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 40),
    share=st.floats(0, 1),
    pixels=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1),
    value=st.floats(-1, 1, width=32),
    seed=st.integers(0, 5),
)
def test_poison_stamps_and_labels_exactly_its_share(
    count: int, share: float, pixels: set[tuple[int, int]], value: float, seed: int
) -> None:
    images = torch.randn(count, 2, 6, 7) * 10
    labels = torch.arange(count) % 3 + 5
    before = images.clone(), labels.clone()
    attack = BadNets(target=2, poison_share=share, pixels=tuple(pixels), value=value)
    poisoned, targets = attack.poison(images, labels, torch.Generator().manual_seed(seed))
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    changed = targets == 2
    assert changed.sum() == round(share * count)
    assert torch.equal(poisoned[~changed], images[~changed])
    assert torch.equal(targets[~changed], labels[~changed])
    assert torch.equal(poisoned[changed], attack.stamp(images[changed]))
    again, _ = attack.poison(images, labels, torch.Generator().manual_seed(seed))
    assert torch.equal(again, poisoned)


def test_targets_and_triggers_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"class 10 does not exist, the classes are 0\.\.9"):
        BadNets(target=10, poison_share=0.5).check((1, 8, 8), 10)
    attack = BadNets(target=2, poison_share=0.5, pixels=((0, 0), (8, 0), (0, 9)))
    with pytest.raises(ValueError, match=r"\[\(8, 0\), \(0, 9\)\].*outside the 8x9 image"):
        attack.check((1, 8, 9), 10)
    attack.check((1, 9, 10), 3)


def test_a_random_fisher_has_the_importance_of_the_published_noise() -> None:
    fisher = torch.rand(1000)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    forged = random_fisher(fisher, torch.Generator().manual_seed(3))
    assert forged.min() == 0

    def importance(values: torch.Tensor) -> torch.Tensor:
        return (values - values.min()) / (values.max() - values.min())

    torch.testing.assert_close(importance(forged), importance(noise), rtol=0, atol=1e-6)


def test_the_honest_fisher_is_uploaded_as_it_is() -> None:
    fisher = torch.rand(10)
    assert torch.equal(ATTACKER_FISHERS["honest"](fisher, torch.Generator()), fisher)


def test_all_attacks_are_tested() -> None:
    assert set(ATTACKS) == {"badnets"}
    assert set(ATTACKER_FISHERS) == {"honest", "random"}
