"""Every header of the kernels includes what it needs: it compiles alone, and so in any order."""

import subprocess
from pathlib import Path

import pytest

from tests.native.test_races import AVX2, COMPILER, CSRC, pytestmark  # noqa: F401

HEADERS = sorted(path.relative_to(CSRC) for path in CSRC.glob("cpu/*/*.inc"))
HEADERS += [Path("cpu/kernels.h"), Path("half_tanh.h"), Path("problems.h")]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_a_header_compiles_alone(header):
    flags = ["-std=c++17", "-fsyntax-only", "-w", *AVX2, f"-I{CSRC}"]
    flags += ["-DFDCR_SIMD_NAME=avx2", "-DFDCR_VECTOR_BYTES=32"]
    command = [COMPILER, *flags, "-x", "c++", "-"]
    source = f'#include "{header}"\n#include "{header}"\n'
    result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if "unrecognized" in result.stderr:
        pytest.skip(f"{COMPILER} has no AVX2")
    assert result.returncode == 0, result.stderr
