import importlib
import os
from contextlib import contextmanager

import pytest

# Test processes run side by side: several threads in each would spend their time waiting for each other. Tests of
# threads ask for them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

from fdcr_fast import _native
from fdcr_fast.ops.operator import OPERATORS
from tests.support.ranks import started

# The same examples on every CI run: a red run can be repeated. Elsewhere every run looks at new ones.
EXAMPLES = int(os.environ.get("FDCR_TEST_EXAMPLES", "60"))  # of each property
settings.register_profile("default", deadline=None, max_examples=EXAMPLES, print_blob=True)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.register_profile("interpreted", settings.get_profile("ci"), max_examples=4)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_ON_HOST = os.environ.get("FDCR_CUDA_ON_HOST")  # the library that tests/cuda_on_host builds
settings.load_profile("interpreted" if INTERPRETED or CUDA_ON_HOST else "ci" if os.environ.get("CI") else "default")

SIMD_LEVELS = ("avx512", "avx2", "baseline")


def pytest_collection_modifyitems(items):
    """What compiles takes longest: begun first, it is not what everything else waits for at the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("cuda_on_host", "native", "triton_kernels"))


@contextmanager
def operators(level):
    """The operators as compiled for one instruction set: a function name -> function."""
    if _native.module is None:
        pytest.skip(_native.reason)
    before = _native.module.simd_level()
    try:
        _native.module.set_simd_level(level)
    except ValueError as error:
        pytest.skip(str(error))
    yield lambda name: getattr(torch.ops.fdcr_fast, name)
    _native.module.set_simd_level(before)


@pytest.fixture(scope="module", params=SIMD_LEVELS)
def compiled(request):
    """The compiled operators in every instruction set that this machine can run, in turn."""
    with operators(request.param) as found:
        yield found


@pytest.fixture(scope="module", params=[*SIMD_LEVELS, "reference", "triton", "cuda"])
def implementation(request):
    """Every implementation of the operators that this machine can run, in turn."""
    if request.param == "reference":
        yield lambda name: OPERATORS[name].reference
    elif request.param == "triton":
        if not INTERPRETED:
            pytest.skip("Triton's interpreter takes a process of its own: tests/triton_kernels runs these tests in one")
        kernels = importlib.import_module("fdcr_fast.ops.triton")
        yield lambda name: getattr(kernels, name)
    elif request.param == "cuda":
        if not CUDA_ON_HOST:
            pytest.skip("the CUDA kernels on the host take a process of their own: tests/cuda_on_host runs one")
        torch.ops.load_library(CUDA_ON_HOST)  # registers them for CPU tensors
        yield lambda name: getattr(torch.ops.fdcr_fast, name)
    else:
        with operators(request.param) as found:
            yield found


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Three processes that can be groups of one, two or three, for all tests of one pytest process."""
    with started(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks
