"""What the GPU, its driver and its compilers are, and which of them is too old."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import fdcr_fast
from fdcr_fast.ops.backends import CAPABILITY

OLDEST_TRITON = (3, 5)  # the first with triton.constexpr_function
NEWEST_CAPABILITY, ITS_TOOLKIT = "10.0", (12, 8)  # that setup.py compiles for by default


@dataclass(frozen=True)
class Versions:
    """Numbers with dots; None for what is not there.

    Attributes:
        torch_cuda: CUDA that PyTorch was built with.
        driver_cuda: Newest CUDA that the driver runs.
        nvcc: CUDA toolkit that would compile the CUDA kernels.
        capability: Compute capability of the first GPU.
    """

    python: str
    fdcr_fast: str
    torch: str
    torch_cuda: str | None
    driver_cuda: str | None
    triton: str | None
    nvcc: str | None
    gpu: str | None
    capability: str | None

    @classmethod
    def here(cls) -> Versions:
        gpu = torch.cuda.is_available()
        return cls(
            python=platform.python_version(),
            fdcr_fast=fdcr_fast.__version__,
            torch=torch.__version__,
            torch_cuda=torch.version.cuda,
            driver_cuda=_driver(),
            triton=_triton(),
            nvcc=_nvcc(),
            gpu=torch.cuda.get_device_name() if gpu else None,
            capability=".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
        )

    def problems(self) -> list[str]:
        """What is missing or too old, and what to do about it."""
        found = []
        if self.torch_cuda is None:
            found.append(f"torch {self.torch} was built without CUDA: install one for NVIDIA GPUs")
        if self.driver_cuda is None:
            found.append("there is no NVIDIA driver (libcuda.so.1)")
        elif self.torch_cuda is not None and _numbers(self.driver_cuda)[0] < _numbers(self.torch_cuda)[0]:
            found.append(
                f"the NVIDIA driver is too old: it runs CUDA {self.driver_cuda}, torch {self.torch} needs "
                f"{self.torch_cuda}: update the driver, or install a torch for CUDA {_numbers(self.driver_cuda)[0]}"
            )
        if self.capability is not None and _numbers(self.capability) < CAPABILITY:
            least = ".".join(map(str, CAPABILITY))
            found.append(f"the GPU is too old: it has compute capability {self.capability}, the kernels need {least}")
        if self.triton is None:
            found.append("triton is not installed: there are no Triton kernels")
        elif _numbers(self.triton) < OLDEST_TRITON:
            least = ".".join(map(str, OLDEST_TRITON))
            found.append(f"triton {self.triton} is too old: its kernels need {least}")
        if self.nvcc is not None and self.torch_cuda is not None:
            if _numbers(self.nvcc)[0] != _numbers(self.torch_cuda)[0]:
                found.append(
                    f"the CUDA toolkit is {self.nvcc}, torch was built with {self.torch_cuda}: the CUDA kernels are "
                    f"compiled by one of the same major version only"
                )
            elif _numbers(self.nvcc) < ITS_TOOLKIT:
                found.append(
                    f"the CUDA toolkit {self.nvcc} is too old to compile for compute capability {NEWEST_CAPABILITY}: "
                    "set TORCH_CUDA_ARCH_LIST to that of the GPU, such as 9.0, and install again"
                )
        return found


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor version."""
    major, minor, *_ = *re.findall(r"\d+", version), "0"
    return int(major), int(minor)


def _driver() -> str | None:
    number = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    command = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if command is None or not Path(command).exists():
        return None
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release ([\d.]+)", said)
    return version[1] if version else None
