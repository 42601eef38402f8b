import os
import subprocess
import sys

import pytest
import torch

import fdcr_fast
from fdcr_fast import _native, ops
from fdcr_fast.ops import conv3x3, networks
from fdcr_fast.ops.operator import OPERATORS
from fdcr_fast.self_test.samples import samples


def test_every_operator_has_a_sample():
    assert set(samples()) == set(OPERATORS)


def test_all_but_the_simulators_are_public():
    own = {conv3x3.__name__, networks.__name__}
    public = {name for name, operator in OPERATORS.items() if operator.__module__ not in own}
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
