"""Training in bfloat16 with weights of float32, and what stays in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdcr_fast.sim import ProgressEvent, SimulationConfig, resume, simulate
from fdcr_fast.sim.training.autograd import AutogradClassifier
from fdcr_fast.sim.training.classifier import classifier_of
from fdcr_fast.sim.training.models import build_model
from fdcr_fast.sim.training.sgd import SGD
from fdcr_fast.sim.training.stacked_model import StackedModel
from tests.support.tiny import tiny_config, without_costs

MIXED = "bf16-mixed"
ROUNDING = 2.0**-8  # of one number to bfloat16


def small_cnn(num_classes: int) -> nn.Module:
    first = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    second = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*first, *second, nn.Linear(32 * 16, num_classes))


class Scattered(nn.Module):
    """A sum of pairs of features into a tensor of its own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 32).index_add(1, torch.arange(64) // 2, x)


def scattered(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), Scattered(), nn.Linear(32, num_classes))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 1, 8, 8, generator=generator), torch.randint(10, (40,), generator=generator)


def made() -> nn.Module:
    return build_model(lambda known: small_cnn(known["num_classes"]), (1, 8, 8), 10, 0)


def test_gradients_are_rounded_and_come_in_float32() -> None:
    (images, labels), model = batch(), made()
    exact, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact_loss = F.cross_entropy(exact(images.double()), labels)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(exact_loss, list(exact.parameters()))])
    with torch.autocast("cpu", torch.bfloat16):
        plain_loss = F.cross_entropy(plain(images), labels)
    rounded = torch.cat([g.flatten() for g in torch.autograd.grad(plain_loss, list(plain.parameters()))])
    errors = {"plain loop": float((rounded - expected).norm() / expected.norm())}
    for precision in ("32-true", MIXED):
        tested = classifier_of(copy.deepcopy(model), precision=precision)
        loss, grad = tested.grad(tested.params(), images, labels, torch.arange(40))
        assert loss.dtype == grad.dtype == torch.float32
        assert abs(loss - exact_loss) < 2 * ROUNDING * exact_loss
        errors[precision] = float((grad - expected).norm() / expected.norm())
    assert errors["32-true"] < 1e-5
    assert ROUNDING / 8 < errors[MIXED] < 1.2 * errors["plain loop"]


def test_training_fishers_and_outputs() -> None:
    (images, labels), rows = batch(), torch.arange(40)
    full, mixed = (classifier_of(made(), precision=precision) for precision in ("32-true", MIXED))
    given, buffers = full.params(), full.buffers()
    order = torch.stack([rows, rows.flip(0)])
    ends = []
    for tested in full, mixed:
        end = buffers.clone()
        ends.append(tested.train(given, images, labels, order, SGD(16, 0.05, 0.9, 1e-5), buffers=end))
        assert not torch.equal(end, buffers)
    moved = (ends[0] - given).norm()
    assert 1e-4 * moved < (ends[1] - ends[0]).norm() < 0.05 * moved
    assert ends[1].dtype == torch.float32
    assert not torch.equal(ends[1], ends[1].bfloat16().float()), "weights stay in float32"
    for method in ("fisher", "logits"):
        rest = (images, labels, rows) if method == "fisher" else (images,)
        found, expected = (getattr(tested, method)(ends[1], *rest, buffers=buffers) for tested in (mixed, full))
        assert torch.equal(found, expected), f"{method} in float32"


def test_a_loss_is_given_outputs_of_float32() -> None:
    seen = set()

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        seen.add(output.dtype)
        return F.cross_entropy(output, labels, reduction="none")

    tested = classifier_of(made(), loss, precision=MIXED)
    tested.grad(tested.params(), *batch(), torch.arange(40))
    assert seen == {torch.float32}


def test_models_of_the_operators_train_by_autograd() -> None:
    model = build_model("mlp", (1, 8, 8), 10, 0)
    assert isinstance(classifier_of(model, precision=MIXED), AutogradClassifier)


@pytest.mark.parametrize("fields", [{"model": "mlp"}, {"attacker_training": "neurotoxin", "rounds": 3}])
def test_any_number_of_workers_gives_the_same_bits(fields: dict[str, Any]) -> None:
    config = tiny_config(**fields, precision=MIXED)
    expected, other = (simulate(config.model_copy(update={"workers": workers})) for workers in (1, 2))
    assert torch.equal(other.params, expected.params)
    assert without_costs(other) == without_costs(expected)
    full = simulate(config.model_copy(update={"precision": "32-true"}))
    assert not torch.equal(full.params, expected.params)


def test_a_resumed_run_has_its_precision(tmp_path: Path) -> None:
    def stop(event: ProgressEvent) -> None:
        if event.round == 2:
            raise KeyboardInterrupt

    config = tiny_config(precision=MIXED)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path, stop, model=small_cnn)
    assert f"precision: {MIXED}\n" in (tmp_path / "config.yaml").read_text()
    assert torch.equal(resume(tmp_path).params, simulate(config, model=small_cnn).params)


def test_as_accurate_as_float32() -> None:
    config = tiny_config(max_train_samples=1200, max_test_samples=500, malicious=0, attack="none", batch_size=16)
    config = config.model_copy(update={"rounds": 4, "local_epochs": 3})
    full, mixed = (
        simulate(config.model_copy(update={"precision": precision}), model=small_cnn)
        for precision in ("32-true", MIXED)
    )
    assert full.summary.accuracy > 0.8
    assert abs(mixed.summary.accuracy - full.summary.accuracy) < 0.03


def test_stacked_clients_train_in_it_too() -> None:
    (images, labels), model = batch(), build_model("mlp", (1, 8, 8), 10, 0)
    single = classifier_of(copy.deepcopy(model), precision=MIXED)
    params, sgd = single.params(), SGD(8, 0.1, 0.9, 0.0)
    rows = [torch.arange(24), torch.arange(16, 40)]
    full, mixed = (StackedModel(copy.deepcopy(model), precision) for precision in ("32-true", MIXED))
    stack = params.expand(2, -1)
    trained = [
        m.train(stack, images, labels, [own.split(sgd.batch_size) for own in rows], sgd) - params for m in (full, mixed)
    ]
    alone = torch.stack([single.train(params, images, labels, own[None], sgd) - params for own in rows])
    assert 1e-4 * alone.norm() < (trained[1] - trained[0]).norm() < 0.05 * alone.norm()
    assert (trained[1] - alone).norm() < 0.02 * alone.norm()
    assert torch.equal(*(m.fishers(stack, images, labels, rows) for m in (full, mixed)))


def test_models_that_cannot_are_named_before_the_first_round() -> None:
    config = tiny_config(malicious=0, attack="none")
    message = r"precision: .*scattered cannot train in bf16-mixed, only in 32-true: .*BFloat16"
    with pytest.raises(ValueError, match=message):
        simulate(config.model_copy(update={"precision": MIXED}), model=scattered)
    simulate(config, model=scattered)


def test_devices_that_cannot_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Current CUDA Device does not support bfloat16")

    monkeypatch.setattr(torch, "autocast", refuse)
    with pytest.raises(ValueError, match=r"precision: cpu cannot train in bf16-mixed: .*does not support bfloat16"):
        simulate(tiny_config(stack=2, precision=MIXED))


def test_names_of_precisions() -> None:
    for unknown in ("bf16", "bfloat16", False, 16):
        with pytest.raises(ValueError, match=r"precision\s.*'32-true' or 'bf16-mixed'"):
            SimulationConfig(precision=unknown)
    config = SimulationConfig(precision=MIXED)
    assert SimulationConfig.from_yaml(config.to_yaml()) == config
    assert SimulationConfig.from_yaml("rounds: 3").precision == "32-true", "as in folders of before"
