from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from fdcr_fast.sim.attacks.training import ATTACKER_TRAININGS, TrainingKnowledge
from fdcr_fast.sim.training.classifier import Classifier, classifier_of
from fdcr_fast.sim.training.models import build_model
from fdcr_fast.sim.training.objective import Objective
from fdcr_fast.sim.training.sgd import SGD, shuffled

LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-2


def unexpected() -> float:
    raise AssertionError("the norm is none of its business")


def knowledge(classifier: Classifier, **fields: object) -> TrainingKnowledge:
    known = TrainingKnowledge(classifier.params(), None, alpha=0.6, share=0.1, norm=unexpected)
    return dataclasses.replace(known, **fields)  # type: ignore[arg-type]


def problem(model: str = "mlp") -> tuple[Classifier, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    pixels = 8 if model == "mlp" else 16
    return (
        classifier_of(build_model(model, (1, pixels, pixels), 4, seed=0)),
        torch.randn(40, 1, pixels, pixels),
        torch.arange(40) % 4,
    )


def train(classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, attack: Objective | None) -> torch.Tensor:
    """Parameters after training from those of the model."""
    order = shuffled(torch.arange(len(labels)), 2, torch.Generator().manual_seed(7))
    return classifier.train(classifier.params(), images, labels, order, SGD(16, LR, MOMENTUM, DECAY), attack)


def by_hand(
    classifier: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    alpha: float,
    anomaly: Callable[[torch.Tensor], torch.Tensor],
    project: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The same training in float64, on one flat vector."""
    model = copy.deepcopy(classifier.model).double()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    flat = classifier.params().double()
    velocity = torch.zeros_like(flat)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        for batch in torch.randperm(len(labels), generator=generator).split(16):
            w = flat.clone().requires_grad_()
            pieces = w.split([shape.numel() for shape in shapes.values()])
            named = {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
            log_p = torch.func.functional_call(model, named, (images[batch].double(),)).log_softmax(1)
            loss = -log_p.gather(1, labels[batch][:, None]).mean()
            loss = alpha * loss + (1 - alpha) * anomaly(w)
            (gradient,) = torch.autograd.grad(loss, w)
            velocity = MOMENTUM * velocity + gradient + DECAY * flat
            flat = project(flat - LR * velocity)
    return flat


def check(trained: torch.Tensor, expected: torch.Tensor, start: torch.Tensor) -> None:
    assert (trained.double() - expected).norm() < 1e-4 * (expected - start).norm()


def stay(w: torch.Tensor) -> torch.Tensor:
    return w


def test_training_without_deviations_is_plain() -> None:
    classifier, images, labels = problem()
    assert ATTACKER_TRAININGS["plain"](knowledge(classifier)) is None
    expected = train(classifier, images, labels, None)
    assert torch.equal(train(classifier, images, labels, Objective()), expected)


@pytest.mark.parametrize("name", ["constrain-l2", "constrain-cosine"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_alpha_of_one_is_plain_training(name: str, model: str) -> None:
    classifier, images, labels = problem(model)
    attack = ATTACKER_TRAININGS[name](knowledge(classifier, alpha=1.0))
    expected = train(classifier, images, labels, None)
    assert torch.equal(train(classifier, images, labels, attack), expected)


@pytest.mark.parametrize("name", ["constrain-l2", "constrain-cosine"])
def test_constrained_loss(name: str) -> None:
    classifier, images, labels = problem()
    start = classifier.params().double()

    def distance(w: torch.Tensor) -> torch.Tensor:
        if name == "constrain-cosine":
            return 1 - w @ start / (w.norm() * start.norm())
        squared = ((w - start) ** 2).sum()
        return squared.sqrt() if squared > 0 else squared * 0

    expected = by_hand(classifier, images, labels, 0.6, distance, stay)
    plain = by_hand(classifier, images, labels, 1.0, distance, stay)
    trained = train(classifier, images, labels, ATTACKER_TRAININGS[name](knowledge(classifier)))
    check(trained, expected, start)
    assert (trained - start).norm() < 0.9 * (plain - start).norm()


@pytest.mark.parametrize("radius", [1e-3, 0.3])
def test_pgd_stays_in_the_ball_at_every_step(radius: float) -> None:
    classifier, images, labels = problem()
    start = classifier.params()
    exact = start.double()

    def project(w: torch.Tensor) -> torch.Tensor:
        norm = (w - exact).norm()
        return w if norm <= radius else exact + (w - exact) * radius / norm

    expected = by_hand(classifier, images, labels, 1.0, lambda w: w.sum() * 0, project)
    trained = train(classifier, images, labels, ATTACKER_TRAININGS["pgd"](knowledge(classifier, norm=lambda: radius)))
    rounding = torch.finfo(torch.float32).eps * start.double().norm()
    norm = (trained.double() - exact).norm()
    assert norm <= radius + rounding
    assert norm > 0.99 * radius
    assert (trained.double() - expected).norm() < 1e-4 * radius + rounding


def test_a_large_ball_is_no_constraint() -> None:
    classifier, images, labels = problem()
    attack = ATTACKER_TRAININGS["pgd"](knowledge(classifier, norm=lambda: 1e3))
    expected = train(classifier, images, labels, None)
    assert torch.equal(train(classifier, images, labels, attack), expected)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.99])
def test_neurotoxin_leaves_the_most_changed_coordinates_alone(share: float) -> None:
    classifier, images, labels = problem("cnn")
    start = classifier.params()
    last = torch.randn(len(start), generator=torch.Generator().manual_seed(1))
    count = round(share * len(start))
    largest = set(sorted(range(len(start)), key=lambda index: -abs(last[index].item()))[:count])
    free = torch.tensor([index not in largest for index in range(len(start))])
    attack = ATTACKER_TRAININGS["neurotoxin"](knowledge(classifier, last_update=last, share=share))
    expected = by_hand(
        classifier, images, labels, 1.0, lambda w: w.sum() * 0, lambda w: torch.where(free, w, start.double())
    )
    trained = train(classifier, images, labels, attack)
    assert torch.equal(trained[~free], start[~free])
    assert (trained[free] != start[free]).double().mean() > 0.9
    check(trained, expected, start)


def test_neurotoxin_has_nothing_to_observe_in_the_first_round() -> None:
    classifier, _, _ = problem()
    assert ATTACKER_TRAININGS["neurotoxin"](knowledge(classifier)) is None


def test_all_ways_of_training_are_tested() -> None:
    assert set(ATTACKER_TRAININGS) == {"plain", "constrain-l2", "constrain-cosine", "pgd", "neurotoxin"}
