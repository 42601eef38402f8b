"""The CPU kernels as a program of their own, with threads that ThreadSanitizer knows.

``make sanitize`` looks for reads and writes out of bounds, and for undefined behaviour.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
COMPILER = os.environ.get("CXX", "g++")
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw"]
FLAGS = {"kernels_avx2": AVX2, "kernels_avx512": AVX512}

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}"),
    pytest.mark.skipif(not CSRC.exists(), reason="no sources: not a checkout"),
]


def build(folder):
    common = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", f"-I{CSRC}"]
    common += ["-fsanitize=thread", "-ffp-contract=fast"]
    sources = [*sorted((CSRC / "cpu").glob("*.cpp")), Path(__file__).with_name("check_kernels.cpp")]
    jobs = []
    for source in sources:
        command = [COMPILER, *common, *FLAGS.get(source.stem, []), "-c", source, "-o", folder / f"{source.stem}.o"]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, errors = job.communicate()
        if "unrecognized" in errors or "cannot find" in errors:
            pytest.skip(f"{COMPILER} has no ThreadSanitizer")
        assert job.returncode == 0, errors
    program = folder / "check_kernels"
    link = [COMPILER, "-fsanitize=thread", *folder.glob("*.o"), "-o", program, "-lpthread"]
    linked = subprocess.run(link, capture_output=True, text=True, check=False)
    if linked.returncode != 0 and "cannot find" in linked.stderr:
        pytest.skip(f"{COMPILER} has no runtime of ThreadSanitizer")
    assert linked.returncode == 0, linked.stderr
    return program


def run(program, rounds, *options):
    return subprocess.run([program, str(rounds), *options], capture_output=True, text=True, check=False)


def test_no_races(tmp_path):
    """Nor any code that instruction sets share.

    A function linked once for all would run with the instructions of one: every kernel file keeps its own.
    """
    program = build(tmp_path)
    result = run(program, 30)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "rounds right" in result.stdout
    planted = run(program, 0, "--plant-race")
    assert planted.returncode != 0
    assert "data race" in planted.stderr

    for name in FLAGS:
        compiled = tmp_path / f"{name}.o"
        symbols = subprocess.run(["nm", "--defined-only", compiled], capture_output=True, text=True, check=True)
        shared = [line for line in symbols.stdout.splitlines() if line.split()[-2] in "WVu"]
        assert [line for line in shared if "__gxx_personality" not in line] == []
