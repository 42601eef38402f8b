"""Builds the compiled kernels where that is possible; everything else stands in pyproject.toml.

FDCR_FAST_BUILD=auto (default) builds the extension and goes on without it where that fails, with a warning;
``require`` fails with the reason; ``off`` does not try.

The CUDA kernels are an extension of their own, built where a CUDA toolkit is found that fits the installed torch.
FORCE_CUDA=0 does not look for one, FORCE_CUDA=1 fails without one; CUDA_HOME names it, TORCH_CUDA_ARCH_LIST what it
compiles for. No GPU is needed.

The operators for the CPU are a library that knows nothing of Python: one serves every version of it, and of torch.
Beside it stands a small module, compiled for one Python, which tells what was built and chooses the instruction set.
FDCR_FAST_PYTHONS names interpreters, separated by spaces: one wheel for all Pythons, with the module for each of these.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).parent
MODE = os.environ.get("FDCR_FAST_BUILD", "auto")
if MODE not in ("auto", "off", "require"):
    raise SystemExit(f"FDCR_FAST_BUILD={MODE!r}: expected auto, off or require")

PYTHONS = os.environ.get("FDCR_FAST_PYTHONS", "").split()

OLDEST_TORCH = (2, 11)
# The stable ABI of the oldest supported release: one binary serves it and everything newer.
TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"

# One kernel source per instruction set. No -march=native: a wheel must run on other processors.
SIMD_FLAGS = {
    "kernels_avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "kernels_avx2": ["-mavx2", "-mfma"],
    "kernels_baseline": [],
}
# What the CUDA kernels are compiled for, in the form of TORCH_CUDA_ARCH_LIST.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
FORCE_CUDA = os.environ.get("FORCE_CUDA", "")
if FORCE_CUDA not in ("", "0", "1"):
    raise SystemExit(f"FORCE_CUDA={FORCE_CUDA!r}: expected 0 or 1")

X86 = platform.machine().lower() in ("x86_64", "amd64")


def torch_folder() -> pathlib.Path:
    """The torch package of the environment that is installed into, also from an isolated build, which hides it."""
    folders = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in folders:
        torch = pathlib.Path(folder, "torch")
        if (torch / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return torch
    raise RuntimeError(
        f"no torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} in {sysconfig.get_path('purelib')}: "
        "install torch first, then fdcr_fast"
    )


def torch_version(folder: pathlib.Path) -> str:
    text = (folder / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text)
    if version is None:
        raise RuntimeError(f"cannot read the version of torch in {folder}")
    numbers = tuple(int(n) for n in version[1].split(".")[:2])
    if numbers < OLDEST_TORCH:
        raise RuntimeError(f"torch {version[1]} is older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}")
    return version[1]


def cuda_home() -> pathlib.Path:
    """The CUDA toolkit: CUDA_HOME, or that of the nvcc on PATH, which may be a wrapper that stands elsewhere."""
    if os.environ.get("CUDA_HOME"):
        home = pathlib.Path(os.environ["CUDA_HOME"])
    elif nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
        home = pathlib.Path(top[1].strip() if top else pathlib.Path(nvcc).parents[1]).resolve()
    else:
        raise RuntimeError("no CUDA toolkit: CUDA_HOME is not set and there is no nvcc on PATH")
    for part in ("bin/nvcc", "include/cuda_runtime.h"):
        if not (home / part).exists():
            raise RuntimeError(f"{home} is no CUDA toolkit: it has no {part}")
    return home


def cuda_version(home: pathlib.Path) -> str:
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]  # type: ignore[index]


def wanted_cuda() -> str | None:
    """Why the CUDA kernels are not built, or None if they are."""
    if FORCE_CUDA == "0":
        return "FORCE_CUDA=0"
    try:
        ours = re.search(r"^cuda: .*= '(\d+)", (torch_folder() / "version.py").read_text(), re.MULTILINE)
        if ours is None:
            raise RuntimeError("the installed torch has no CUDA")
        version = cuda_version(cuda_home())
        if version.split(".")[0] != ours[1]:
            raise RuntimeError(f"the CUDA toolkit is {version}, the installed torch needs {ours[1]}")
    except RuntimeError as error:
        if FORCE_CUDA == "1":
            raise SystemExit(f"FORCE_CUDA=1: {error}") from error
        return str(error)
    return None


def gencode() -> list[str]:
    flags = []
    for name in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES):
        number = name.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if name.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


class BuildKernels(build_ext):
    """Per-source flags, sources for nvcc, and the three build modes."""

    def run(self) -> None:
        try:
            super().run()
        except (Exception, SystemExit) as error:
            if MODE == "require":
                raise
            for ext in self.extensions:  # all or nothing
                pathlib.Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            self.extensions = []
            warnings.warn(f"fdcr_fast is installed without its compiled kernels: {error}", stacklevel=2)

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return os.path.join(*folders, FILE_NAMES[name]) if name in FILE_NAMES else super().get_ext_filename(fullname)

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        ParallelCompile().install()
        torch = torch_folder()
        ext.define_macros.append(("FDCR_TORCH_VERSION", f'"{torch_version(torch)}"'))
        if ext is not kernels:
            ext.include_dirs.append(pybind11.get_include())
        if ext.name.startswith(MODULE):
            ext.library_dirs.append(str(pathlib.Path(self.get_ext_fullpath(kernels.name)).parent))
        else:
            # -isystem: our warnings, not theirs.
            ext.extra_compile_args += ["-isystem", str(torch / "include")]
            ext.library_dirs.append(str(torch / "lib"))
            ext.libraries += ["torch", "torch_cpu", "c10"]
            ext.define_macros.append(("TORCH_TARGET_VERSION", TARGET_VERSION))
        if ext is cuda_kernels:
            home = cuda_home()
            ext.include_dirs.append(str(home / "include"))
            ext.library_dirs.append(str(home / "lib64"))
            ext.libraries += ["torch_cuda", "cudart"]
        self.compiler.src_extensions.append(".cu")
        compile_one = self.compiler._compile

        def with_own_flags(obj, src, ext_name, cc_args, postargs, pp_opts):  # type: ignore[no-untyped-def]
            if src.endswith(".cu"):
                command = [home / "bin" / "nvcc", *NVCC_FLAGS, *gencode(), "-Icsrc", "-c", src, "-o", obj]
                subprocess.run(command, check=True)
                return
            flags = SIMD_FLAGS.get(pathlib.Path(src).stem, [])
            compile_one(obj, src, ext_name, cc_args, [*postargs, *flags], pp_opts)

        self.compiler._compile = with_own_flags
        try:
            super().build_extension(ext)
        finally:
            self.compiler._compile = compile_one


class OneWheel(bdist_wheel):
    """A wheel for every Python, where FDCR_FAST_PYTHONS says whose modules it holds."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if PYTHONS else (python, abi, platform)


def sources() -> list[str]:
    names = ["operators.cpp", "fisher_operators.cpp", "network_operators.cpp", "conv3x3_operators.cpp"]
    names += ["cpu/dispatch.cpp", "cpu/kernels_baseline.cpp"]
    if X86:
        names += ["cpu/kernels_avx2.cpp", "cpu/kernels_avx512.cpp"]
    return [f"csrc/{name}" for name in names]


def headers(without: str) -> list[str]:
    """All of csrc but what another device's kernels are made of."""
    found = (path.relative_to(HERE) for path in HERE.glob("csrc/**/*.*"))
    return [str(path) for path in found if path.parts[1] != without]


CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-ffp-contract=fast",
    "-fno-math-errno",  # a square root is one instruction
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    *os.environ.get("FDCR_FAST_CXXFLAGS", "").split(),
]
LD_FLAGS = os.environ.get("FDCR_FAST_LDFLAGS", "").split()
FILE_NAMES = {"libfdcr_fast": "libfdcr_fast.so"}  # of what is not named after this Python
MODULE = "fdcr_fast._C"

kernels = Extension(
    "fdcr_fast.libfdcr_fast",
    sources(),
    include_dirs=["csrc"],
    depends=[*headers(without="cuda"), "setup.py"],
    language="c++",
    extra_compile_args=list(CXX_FLAGS),
    extra_link_args=["-Wl,-soname,libfdcr_fast.so", *LD_FLAGS],
)


def module(name: str, include: list[str]) -> Extension:
    return Extension(
        name,
        ["csrc/module.cpp"],
        include_dirs=["csrc", *include],
        depends=["csrc/cpu/kernels.h", "csrc/problems.h", "setup.py"],
        language="c++",
        extra_compile_args=list(CXX_FLAGS),
        libraries=["fdcr_fast"],
        extra_link_args=["-Wl,-rpath,$ORIGIN", *LD_FLAGS],
    )


def module_for(python: str) -> Extension:
    """The module for another interpreter than this one."""
    ask = "import json, sysconfig as s; print(json.dumps([s.get_config_var('EXT_SUFFIX'), s.get_path('include')]))"
    suffix, include = json.loads(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout)
    name = MODULE + suffix.replace(".", "_")
    FILE_NAMES[name.removeprefix("fdcr_fast.")] = f"_C{suffix}"
    return module(name, [include])


cuda_kernels = Extension(
    "fdcr_fast._cuda",
    sorted(str(path.relative_to(HERE)) for pattern in ("*.cu", "*.cpp") for path in HERE.glob(f"csrc/cuda/{pattern}")),
    include_dirs=["csrc"],
    depends=[*headers(without="cpu"), "setup.py"],
    language="c++",
    define_macros=[
        ("FDCR_CUDA_ARCHITECTURES", f'"{os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES}"'),
    ],
    extra_compile_args=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"],
)


def extensions() -> list[Extension]:
    if MODE == "off":
        return []
    modules = {ext.name: ext for ext in map(module_for, PYTHONS)} or {MODULE: module(MODULE, [])}
    cpu = [kernels, *modules.values()]
    if (reason := "FDCR_FAST_PYTHONS: it is for one Python" if PYTHONS else wanted_cuda()) is not None:
        print(f"fdcr_fast: without CUDA kernels: {reason}", file=sys.stderr)
        return cpu
    return [*cpu, cuda_kernels]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": OneWheel},
)
