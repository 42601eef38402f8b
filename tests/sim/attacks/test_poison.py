from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdcr_fast.sim.attacks.poison import (
    ATTACKS,
    BadNets,
    DistributedBackdoor,
    LabelFlip,
    Poisoning,
    PoisonOptions,
)
from fdcr_fast.sim.attacks.trigger import PAPER_TRIGGER, Pixels

OPTIONS = PoisonOptions(
    target=2,
    poison_share=0.5,
    source=0,
    trigger=PAPER_TRIGGER,
    trigger_value=1.0,
    blend_alpha=0.2,
    attack_file=None,
    attackers=3,
    image_shape=(2, 6, 7),
    num_classes=8,
    seed=0,
)


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(name: str, tmp_path: Path | None = None, **options: Any) -> Poisoning:
    if name == "edge-case":
        assert tmp_path is not None
        path = tmp_path / "edge.npz"
        rng = np.random.default_rng(1)
        np.savez(path, x_train=rng.random((5, 6, 7, 2)) - 0.5, x_test=rng.random((4, 6, 7, 2)) - 0.5)
        options["attack_file"] = path
    return ATTACKS[name](replace(OPTIONS, **options))


def data(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 2, 6, 7, generator=draws(9)) * 2 - 1, torch.arange(count) % 8


def test_the_papers_trigger_sets_twelve_pixels_of_every_channel() -> None:
    images = torch.rand(5, 3, 8, 9) - 0.5
    stamped = BadNets(target=2, poison_share=0.5).poisoned(images, 0, draws())
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
    poisoned, targets = attack.poison(images, labels, 0, draws(seed))
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    changed = targets == 2
    assert changed.sum() == round(share * count)
    assert torch.equal(poisoned[~changed], images[~changed])
    assert torch.equal(targets[~changed], labels[~changed])
    marked = torch.zeros(6, 7, dtype=torch.bool)
    for row, column in pixels:
        marked[row, column] = True
    assert (poisoned[changed][:, :, marked] == value).all()
    assert torch.equal(poisoned[changed][:, :, ~marked], images[changed][:, :, ~marked])
    again, _ = attack.poison(images, labels, 0, draws(seed))
    assert torch.equal(again, poisoned)


@given(
    pixels=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=1, max_size=20),
    attackers=st.integers(0, 12),
)
def test_parts_of_a_distributed_backdoor_are_disjoint_and_together_the_trigger(
    pixels: list[tuple[int, int]], attackers: int
) -> None:
    attack = DistributedBackdoor(2, 0.5, tuple(pixels), 1.0, attackers)
    joined = [pixel for part in attack.parts for pixel in part]
    assert sorted(joined) == sorted(set(pixels))
    sizes = [len(part) for part in attack.parts]
    assert len(sizes) == min(max(attackers, 1), len(set(pixels)))
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_the_papers_trigger_has_the_four_bars_of_dba() -> None:
    bars: list[Pixels] = [tuple((row, start + i) for i in range(3)) for row in (0, 2) for start in (0, 4)]
    assert list(DistributedBackdoor(2, 0.5, attackers=4).parts) == bars


def test_attackers_train_with_their_part_and_are_tested_with_the_whole() -> None:
    attack = build("dba", trigger=((0, 0), (0, 1), (5, 6)), attackers=2, poison_share=1.0)
    images, labels = data()
    for attacker, pixels in enumerate([[(0, 0)], [(0, 1), (5, 6)], [(0, 0)]]):
        poisoned, targets = attack.poison(images, labels, attacker, draws())
        changed = {(row, column) for _, _, row, column in torch.nonzero(poisoned != images).tolist()}
        assert changed == set(pixels)
        assert (targets == 2).all()
    victims = attack.victims(images, labels)
    others = images[labels != 2]
    changed = {(row, column) for _, _, row, column in torch.nonzero(victims != others).tolist()}
    assert changed == {(0, 0), (0, 1), (5, 6)}


@pytest.mark.parametrize("own", [True, False])
def test_blended_is_a_convex_combination(tmp_path: Path, own: bool) -> None:
    images, labels = data()
    pattern = np.random.default_rng(0).random((1, 6, 7, 2)).astype(np.float32) * 2 - 1
    if own:
        np.savez(tmp_path / "pattern.npz", pattern=pattern)
        attack = build("blended", attack_file=tmp_path / "pattern.npz", blend_alpha=0.3, poison_share=1.0)
        expected = 0.7 * images.numpy() + 0.3 * pattern.transpose(0, 3, 1, 2)
    else:
        attack, other = (build("blended", blend_alpha=0.3, poison_share=1.0, seed=seed) for seed in (0, 1))
        black = attack.poisoned(torch.zeros(1, 2, 6, 7), 0, draws()).numpy()
        assert not np.array_equal(black, other.poisoned(torch.zeros(1, 2, 6, 7), 0, draws()).numpy())
        assert 0.25 < np.abs(black).max() <= 0.3
        expected = 0.7 * images.numpy() + black
    poisoned, _ = attack.poison(images, labels, 1, draws())
    np.testing.assert_allclose(poisoned.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(attack.victims(images, labels).numpy(), expected[labels.numpy() != 2], atol=1e-6)


@pytest.mark.parametrize("count", [8, 40])
def test_edge_cases_take_the_place_of_images(tmp_path: Path, count: int) -> None:
    attack = build("edge-case", tmp_path)
    with np.load(tmp_path / "edge.npz") as arrays:
        train, test = (torch.from_numpy(arrays[name]).float().permute(0, 3, 1, 2) for name in ("x_train", "x_test"))
    images, labels = data(count)
    poisoned, targets = attack.poison(images, labels, 0, draws())
    changed = (poisoned != images).flatten(1).any(1)
    assert changed.sum() == count // 2
    assert (targets[changed] == 2).all()
    assert torch.equal(targets[~changed], labels[~changed])
    used = [[torch.equal(image, edge) for edge in train].index(True) for image in poisoned[changed]]
    if count // 2 <= 5:
        assert len(set(used)) == len(used), "without replacement where there are enough"
    assert torch.equal(attack.victims(images, labels), test)


@pytest.mark.parametrize(("share", "flipped"), [(1.0, 5), (0.4, 2), (0.0, 0)])
def test_labels_of_the_source_class_are_flipped(share: float, flipped: int) -> None:
    images, labels = data()
    attack = build("label-flip", source=7, poison_share=share)
    poisoned, targets = attack.poison(images, labels, 0, draws())
    assert torch.equal(poisoned, images)
    changed = targets != labels
    assert changed.sum() == flipped
    assert (labels[changed] == 7).all()
    assert (targets[changed] == 2).all()
    assert torch.equal(attack.victims(images, labels), images[labels == 7])


def test_a_client_without_the_source_class_has_nothing_to_flip() -> None:
    images, labels = data()
    kept = labels != 7
    poisoned, targets = LabelFlip(2, 1.0, 7).poison(images[kept], labels[kept], 0, draws())
    assert torch.equal(poisoned, images[kept])
    assert torch.equal(targets, labels[kept])


def test_no_attack_changes_nothing_and_has_no_victims() -> None:
    images, labels = data()
    poisoned, targets = build("none").poison(images, labels, 0, draws())
    assert torch.equal(poisoned, images)
    assert torch.equal(targets, labels)
    assert len(build("none").victims(images, labels)) == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_copies_and_is_repeatable(tmp_path: Path, name: str) -> None:
    attack = build(name, tmp_path)
    images, labels = data()
    before = images.clone(), labels.clone()
    first, again, other = (attack.poison(images, labels, 1, draws(seed)) for seed in (3, 3, 4))
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[0].shape == images.shape
    if name != "none":
        assert not torch.equal(first[1], other[1])
    victims = attack.victims(images, labels)
    assert victims.shape[1:] == images.shape[1:]
    assert torch.equal(images, before[0])
    if name in ("badnets", "blended", "dba"):
        assert len(victims) == 35


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("badnets", {"target": 8}, r"target: class 8 does not exist, the classes are 0\.\.7"),
        ("blended", {"target": 8}, "target: class 8"),
        ("dba", {"target": 8}, "target: class 8"),
        ("label-flip", {"target": 8}, "target: class 8"),
        ("label-flip", {"source": 9}, "source: class 9 does not exist"),
        ("label-flip", {"source": 2}, "source: label-flip needs a class other than the target, both are 2"),
        ("badnets", {"trigger": ((0, 0), (6, 0), (0, 7))}, r"trigger: pixels \[\(6, 0\), \(0, 7\)\].*the 6x7 image"),
        ("dba", {"trigger": ((6, 0),)}, "outside the 6x7 image"),
        ("edge-case", {}, "attack_file: edge-case needs a file FILE.npz with x_train and x_test, got none"),
    ],
)
def test_attacks_that_do_not_fit_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](replace(OPTIONS, **options))


def test_options_of_other_attacks_are_harmless() -> None:
    nonsense: dict[str, Any] = {"trigger": ((99, 99),), "source": 99, "attack_file": Path("nowhere.npz")}
    ATTACKS["none"](replace(OPTIONS, target=99, **nonsense))
    ATTACKS["label-flip"](replace(OPTIONS, **{**nonsense, "source": 1}))
    ATTACKS["badnets"](replace(OPTIONS, **{**nonsense, "trigger": PAPER_TRIGGER}))
    ATTACKS["blended"](replace(OPTIONS, **{**nonsense, "attack_file": None}))


@pytest.mark.parametrize(
    ("name", "arrays", "message"),
    [
        ("edge-case", {"x_train": np.zeros((3, 6, 7, 2))}, "missing arrays x_test; it holds x_train"),
        (
            "edge-case",
            {"x_train": np.zeros((3, 6, 7, 2)), "x_test": np.zeros((3, 6, 7))},
            r"x_test: expected images of .* \(2, 6, 7\), got \(1, 6, 7\)",
        ),
        ("edge-case", {"x_train": np.zeros((3, 6)), "x_test": np.zeros((3, 6, 7, 2))}, r"x_train: .* got \(3, 6\)"),
        ("blended", {"pattern": np.zeros((2, 6, 7, 2))}, "pattern: expected one image, got 2"),
        ("blended", {"pattern": np.full((1, 6, 7, 2), 3.0)}, "pattern: expected floats in"),
        ("blended", {"pattern": np.array([None])}, "attack_file: .*pickle"),
        ("blended", None, "attack_file: no file .*with pattern"),
        ("edge-case", b"no archive", "attack_file: .*file.npz: "),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path: Path, name: str, arrays: Any, message: str) -> None:
    path = tmp_path / "file.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays is not None:
        path.write_bytes(arrays)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ATTACKS[name](replace(OPTIONS, attack_file=path))
