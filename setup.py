"""Builds the compiled kernels where that is possible; everything else stands in pyproject.toml.

FDCR_FAST_BUILD=auto (default) builds the extension and goes on without it where that fails, with a warning;
``require`` fails with the reason; ``off`` does not try.
"""

from __future__ import annotations

import os
import pathlib
import platform
import re
import sys
import sysconfig
import warnings

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = pathlib.Path(__file__).parent
MODE = os.environ.get("FDCR_FAST_BUILD", "auto")
if MODE not in ("auto", "off", "require"):
    raise SystemExit(f"FDCR_FAST_BUILD={MODE!r}: expected auto, off or require")

OLDEST_TORCH = (2, 10)
# The stable ABI of the oldest supported release: one binary serves it and everything newer.
TARGET_VERSION = f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"

# One kernel source per instruction set. No -march=native: a wheel must run on other processors.
SIMD_FLAGS = {
    "kernels_avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "kernels_avx2": ["-mavx2", "-mfma"],
    "kernels_baseline": [],
}
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


class BuildKernels(build_ext):
    """Per-source instruction set flags, and the three build modes."""

    def run(self) -> None:
        try:
            super().run()
        except (Exception, SystemExit) as error:
            if MODE == "require":
                raise
            self.extensions = []
            warnings.warn(f"fdcr_fast is installed without its compiled kernels: {error}", stacklevel=2)

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        ParallelCompile().install()
        torch = torch_folder()
        ext.include_dirs.append(pybind11.get_include())
        # -isystem: our warnings, not theirs.
        ext.extra_compile_args += ["-isystem", str(torch / "include")]
        ext.library_dirs.append(str(torch / "lib"))
        ext.libraries += ["torch", "torch_cpu", "c10"]
        ext.define_macros += [
            ("FDCR_TORCH_VERSION", f'"{torch_version(torch)}"'),
            ("TORCH_TARGET_VERSION", TARGET_VERSION),
        ]
        compile_one = self.compiler._compile

        def with_simd_flags(obj, src, ext_name, cc_args, postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = SIMD_FLAGS.get(pathlib.Path(src).stem, [])
            compile_one(obj, src, ext_name, cc_args, [*postargs, *flags], pp_opts)

        self.compiler._compile = with_simd_flags
        super().build_extension(ext)


def sources() -> list[str]:
    names = ["module.cpp", "operators.cpp", "network_operators.cpp", "cpu/dispatch.cpp", "cpu/kernels_baseline.cpp"]
    if X86:
        names += ["cpu/kernels_avx2.cpp", "cpu/kernels_avx512.cpp"]
    return [f"csrc/{name}" for name in names]


kernels = Extension(
    "fdcr_fast._C",
    sources(),
    include_dirs=["csrc"],
    depends=[str(path.relative_to(HERE)) for path in HERE.glob("csrc/**/*.*")],
    language="c++",
    extra_compile_args=[
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
    ],
    extra_link_args=os.environ.get("FDCR_FAST_LDFLAGS", "").split(),
)

setup(
    ext_modules=[] if MODE == "off" else [kernels],
    cmdclass={"build_ext": BuildKernels},
)
