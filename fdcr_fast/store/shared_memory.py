"""Tensors that several processes of a machine share."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor


class SharedTensor:
    """A CPU tensor in memory without a name; a process that gets it as an argument when it is started sees the same.

    It goes to processes as a file descriptor, not through /dev/shm, which containers often limit to 64 MB, and is
    freed with the last process.

    Attributes:
        tensor: Zeros at first.
    """

    def __init__(self, size: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None) -> None:
        nbytes = max(torch.Size(size).numel() * dtype.itemsize, 1)
        self._open(_anonymous_file(nbytes), tuple(size), dtype, stride)

    @classmethod
    def of(cls, tensor: Tensor) -> SharedTensor:
        """A copy of a tensor, with its strides where they are dense."""
        shared = cls(tensor.shape, tensor.dtype, torch.empty_like(tensor, device="meta").stride())
        shared.tensor.copy_(tensor)
        return shared

    def _open(self, file: int, size: tuple[int, ...], dtype: torch.dtype, stride: Sequence[int] | None) -> None:
        weakref.finalize(self, os.close, file)
        self._file = file
        flat = torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)[: torch.Size(size).numel() * dtype.itemsize]
        flat = flat.view(dtype)
        self.tensor = flat.view(size) if stride is None else flat.as_strided(size, stride)

    def __getstate__(self) -> tuple[Any, ...]:
        return DupFd(self._file), tuple(self.tensor.shape), self.tensor.dtype, self.tensor.stride()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        file, size, dtype, stride = state
        self._open(file.detach(), size, dtype, stride)


def _anonymous_file(nbytes: int) -> int:
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("fdcr_fast")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, nbytes)
    return file
