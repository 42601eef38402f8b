from __future__ import annotations

import pytest
import torch

from fdcr_fast.sim.training.models import MODELS, build_model


@pytest.mark.parametrize(
    ("shape", "features"),
    [((1, 28, 28), 16 * 4 * 4), ((3, 32, 32), 16 * 5 * 5), ((1, 16, 16), 16), ((1, 16, 20), 32)],
)
def test_the_papers_cnn(shape: tuple[int, int, int], features: int) -> None:
    model = build_model("cnn", shape, 10, seed=0)
    expected = [
        (6, shape[0], 5, 5),
        (16, 6, 5, 5),
        (120, features),
        (84, 120),
        (84, 84),
        (256, 84),
        (10, 256),
    ]
    assert [tuple(weight.shape) for weight in model.parameters() if weight.dim() > 1] == expected
    assert model(torch.zeros(2, *shape)).shape == (2, 10)
    layers = [type(layer).__name__ for layer in model]
    assert layers[-3:] == ["ReLU", "Linear", "Linear"], "no ReLU after the hidden layer of 256"
    assert layers.count("ReLU") == 5


@pytest.mark.parametrize(("shape", "same"), [((1, 8, 8), "mlp"), ((1, 15, 40), "mlp"), ((1, 16, 16), "cnn")])
def test_auto_follows_the_image_size(shape: tuple[int, int, int], same: str) -> None:
    assert str(build_model("auto", shape, 10, 0)) == str(build_model(same, shape, 10, 0))


@pytest.mark.parametrize("name", MODELS)
def test_weights_depend_on_the_seed_only(name: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in build_model(name, (1, 16, 16), 4, seed).parameters()])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before), "the global generator must stay as it was"
    torch.manual_seed(6)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_cnn_refuses_small_images() -> None:
    with pytest.raises(ValueError, match=r"16x16 pixels, got 8x8.*mlp"):
        build_model("cnn", (1, 8, 8), 10, 0)
