"""The .npy format, in which Flower sends arrays: seen as tensors on the bytes that came in."""

from __future__ import annotations

import io
import math

import numpy as np
from torch import Tensor

from fdcr_fast.store.upload import tensor_view


def npy_tensor(data: bytes) -> Tensor:
    """The array in an .npy file as a tensor that must not be written; bytes of native floats are not copied.

    Raises:
        ValueError: the bytes are no such file, or fewer than its header says.
        TypeError: its dtype is unknown to torch. Pickled objects are never loaded.
    """
    file = io.BytesIO(data)  # shares the bytes
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an .npy file of version {version} is not supported")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read_header(file)
    except Exception as error:  # some raise what Python's tokenizer raises
        raise ValueError(f"it is no .npy file: {error}") from None
    if dtype.hasobject:
        raise TypeError("arrays of Python objects are not accepted")
    if any(size < 0 for size in shape):
        raise ValueError(f"negative sizes in shape {shape}")
    flat = np.frombuffer(data, dtype, math.prod(shape), file.tell())
    return tensor_view(np.require(flat.reshape(shape, order="F" if fortran else "C"), requirements="A"))
