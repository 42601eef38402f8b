"""Every header of the kernels includes what it needs: it compiles alone, and so in any order."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
HEADERS = sorted(path.relative_to(CSRC) for path in CSRC.glob("cpu/*/*.inc"))
HEADERS += [Path("cpu/kernels.h"), Path("half_tanh.h"), Path("problems.h")]

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}"),
    pytest.mark.skipif(not CSRC.exists(), reason="no sources: not a checkout"),
]


@pytest.mark.parametrize("header", HEADERS, ids=str)
def test_a_header_compiles_alone(header):
    flags = ["-std=c++17", "-fsyntax-only", "-w", "-mavx2", "-mfma", f"-I{CSRC}"]
    flags += ["-DFDCR_SIMD_NAME=avx2", "-DFDCR_VECTOR_BYTES=32"]
    command = [COMPILER, *flags, "-x", "c++", "-"]
    source = f'#include "{header}"\n#include "{header}"\n'
    result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
