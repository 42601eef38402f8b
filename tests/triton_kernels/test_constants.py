"""Numbers that Triton's kernels have of their own are those of the compiled ones."""

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.polynomial import Polynomial

HEADER = Path(__file__).parents[2] / "csrc" / "half_tanh.h"

tl = pytest.importorskip("triton.language", reason="the package triton is not installed")


@pytest.mark.skipif(not HEADER.exists(), reason="no sources: not a checkout")
@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("double", np.float64)])
def test_half_tanh(name, dtype):
    from fdcr_fast.ops.triton.aggregation import half_tanh

    (written,) = re.findall(rf"static constexpr {name} c\[\] = {{(.*?)}};", HEADER.read_text(), re.DOTALL)
    compiled = [dtype(number.strip().removesuffix("f")) for number in written.split(",")]
    x = Polynomial([0.0, 1.0])
    x.dtype = tl.float64 if dtype is np.float64 else tl.float32
    found = half_tanh.fn(x).coef  # of x, x^3, x^5, ...
    assert not found[::2].any()
    assert [dtype(number) for number in found[1::2]] == compiled
    assert len(compiled) > 4
