import os
import subprocess
import sys

import pytest
import torch

import fdcr_fast
from fdcr_fast import _native, ops
from fdcr_fast.ops import networks
from fdcr_fast.ops.networks import NetworkLayer
from fdcr_fast.ops.operator import OPERATORS


def clients(K=3, P=10, dtype=torch.float32):
    updates, fishers = torch.randn(1, K, P, dtype=dtype), torch.rand(1, K, P, dtype=dtype)
    return updates, fishers, *ops.importance_range(fishers, P), torch.full((K,), 1 / K, dtype=torch.float64)


def samples():
    updates, fishers, low, high, alpha = clients()
    totals = torch.zeros(7, dtype=torch.float64)
    conv = (torch.randn(2, 4, 3, 3), torch.randn(2, 2, 5, 5), [3, 3], [1, 1], [0, 0], [1, 1], 2)
    ranges, sums = [torch.tensor([[0, 3], [4, 10]])] * 2, torch.zeros(2, 3, 3, dtype=torch.float64)
    layers = [*NetworkLayer(4, 3, 3, pool=1, relu=1), *NetworkLayer(3)]
    params, images, labels, rows = (
        torch.randn(127),
        torch.randn(5, 2, 6, 7),
        torch.tensor([0, 1, 2, 1, 0]),
        torch.arange(3),
    )
    return {
        "network_outputs": [(params, images, rows, layers)],
        "network_grad": [(params, images, labels, rows, layers)],
        "sum_squared_network_grads": [(params, images, labels, rows, layers)],
        "train_network": [(params, images, labels, rows[None], layers, 2, 0.1, 0.9, 1e-3)],
        "sgd_step": [(*torch.randn(3, 10), 0.1, 0.9, 1e-3)],
        "sum_squared_grads_linear": [
            (torch.randn(2, 3, 4), torch.randn(2, 3, 5)),
            (torch.randn(2, 1, 4, dtype=torch.float64), torch.randn(2, 1, 5)),
        ],
        "sum_squared_grads_conv": [conv],
        "sum_squared_grads_norm": [
            (*torch.randn(2, 2, 3, 2, 4, 5), None, None, 1e-5),
            (*torch.randn(2, 2, 3, 1, 4, 1), torch.zeros(1, 4), torch.ones(1, 4), 1e-5),
        ],
        "sum_squared_grads_embedding": [(torch.randn(2, 3, 4), torch.tensor([[0, 1, 0], [4, -1, 2]]), 5)],
        "fill_row": [
            (
                [torch.randn(4), torch.randn(6, dtype=torch.bfloat16)],
                torch.zeros(3, 4),
                torch.tensor([0.0, torch.inf, -torch.inf], dtype=torch.float64),
            ),
            (
                [torch.randn(10)],
                torch.zeros(3, 4),
                torch.tensor([0.0, torch.inf, -torch.inf], dtype=torch.float64),
                torch.randn(10),
            ),
        ],
        "fill_rows": [
            ([torch.randn(4), torch.randn(16, dtype=torch.bfloat16)], torch.zeros(3, 2, 4)),
            ([torch.randn(20)], torch.zeros(3, 2, 4, dtype=torch.float64), torch.randn(10)),
        ],
        "importance_range": [(fishers, 10)],
        "squared_norm": [(updates, 10)],
        "moments": [
            (updates, torch.randn(10, dtype=torch.float64), alpha > 0, ranges[0], sums[0, :2], 10, True),
            (updates, None, alpha > 0, ranges[1], sums[0, :2], 10, False),
        ],
        "discrepancy": [
            (updates, fishers, low, high, alpha, totals, 10, False),
            (updates, None, None, None, alpha, totals, 10, True),
        ],
        "rescaled_mean": [
            (torch.randn(10), updates, fishers, low, high, alpha, True),
            (torch.randn(10, dtype=torch.bfloat16), updates, None, None, None, alpha, False),
        ],
        "discrepancy_and_mean": [
            (torch.randn(10), updates, fishers, low, high, alpha, alpha, totals, True, True, False),
            (torch.randn(10), updates, None, None, None, alpha, alpha, totals, False, False, True),
        ],
        "central_mean": [
            (torch.randn(10), updates, alpha > 0, 1, False),
            (torch.randn(10, dtype=torch.float16), updates.double(), alpha > 0, 2, True),
        ],
        "gram": [
            (updates, fishers, low, high, alpha > 0, ["update", "fourth_root_fisher"], ranges, sums, 10, True),
            (updates.double(), None, None, None, alpha > 0, ["update"], ranges[:1], sums[:1], 10, False),
        ],
    }


def test_every_operator_has_a_sample():
    assert set(samples()) == set(OPERATORS)


def test_all_but_those_of_networks_are_public():
    public = {name for name, operator in OPERATORS.items() if operator.__module__ != networks.__name__}
    assert public == set(ops.__all__) - {"STRETCH"}
    assert all(getattr(ops, name) is OPERATORS[name] for name in public)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    for args in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.fdcr_fast, name).default, args)


@pytest.mark.parametrize("name", OPERATORS)
def test_under_torch_compile(name):
    function = OPERATORS[name]
    torch.compiler.reset()  # operators share their code, and each would count as one more recompilation of it
    for args in samples()[name]:
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args), function(*args), rtol=0, atol=0)


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_reference_can_be_forced():
    code = "import fdcr_fast; print(fdcr_fast.backends()['cpu'].usable)"
    assert run(code, FDCR_FAST_BACKEND="reference").stdout == "False\n"


@pytest.mark.parametrize("variable", ["FDCR_FAST_BACKEND", "FDCR_FAST_SIMD"])
def test_a_choice_that_cannot_be_honoured_raises(variable):
    if variable == "FDCR_FAST_SIMD" and _native.module is None:
        pytest.skip(_native.reason)
    result = run("import fdcr_fast", **{variable: "abacus"})
    assert result.returncode != 0
    assert "abacus" in result.stderr
    assert "expected" in result.stderr


def test_backends_and_info_say_what_is_used():
    backends = fdcr_fast.backends()
    assert list(backends) == ["reference", "cpu", "triton", "cuda"]
    assert backends["reference"].usable
    assert backends["cpu"].usable == _native.loaded
    assert all(status.reason for status in backends.values())
    text = fdcr_fast.info()
    assert all(name in text for name in (*backends, fdcr_fast.__version__, torch.__version__))


def test_import_initialises_nothing():
    code = (
        "import sys, torch, fdcr_fast\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'torchvision', 'sklearn', 'matplotlib', 'pydantic', 'click', 'triton', 'fdcr_fast.sim'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
