"""Builds the CUDA kernels for the host, as a library that registers them for CPU tensors."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CSRC, HERE = ROOT / "csrc", Path(__file__).parent
TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX", "g++").split()


def build(folder, *flags):
    if shutil.which(COMPILER[-1]) is None:
        pytest.skip(f"no compiler {COMPILER[-1]}")
    if not CSRC.exists():
        pytest.skip("no sources: not a checkout")
    common = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *flags]
    common += ["-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Werror", f"-I{CSRC}", f"-I{HERE}"]
    common += ["-DFDCR_CUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", TORCH / "include"]
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "operators.cpp", HERE / "counts.cpp"]
    library = folder / "libcuda_on_host.so"

    def compiled(source):
        command = [*COMPILER, *common, "-x", "c++", "-c", source, "-o", folder / f"{source.name}.o"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        results = [*pool.map(compiled, sources)]
    link = [*COMPILER, "-shared", *flags, *folder.glob("*.o"), "-o", library, f"-L{TORCH / 'lib'}"]
    link += ["-ltorch", "-ltorch_cpu", "-lc10", "-lpthread"]
    if all(result.returncode == 0 for result in results):
        results.append(subprocess.run(link, capture_output=True, text=True, check=False))
    errors = "".join(result.stderr for result in results if result.returncode)
    if "unrecognized" in errors or "cannot find -l" in errors:
        pytest.skip(f"{COMPILER[-1]} cannot: {errors[-300:]}")
    assert not errors, errors[-5000:]
    return library


def run(*command, **env):
    """With the operators free for the library to take."""
    env = {**os.environ, "FDCR_FAST_BACKEND": "reference", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def sanitized(folder, sanitizers, runtimes):
    """A library whose threads are those of the operating system, and what to preload for its sanitizers."""
    library = build(folder, f"-fsanitize={sanitizers}")
    paths = []
    for name in (*runtimes, "stdc++"):
        command = [COMPILER[-1], f"-print-file-name=lib{name}.so"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return library, " ".join(paths)
