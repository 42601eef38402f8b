"""What a client may send as its vector ``[P]``: seen as tensors on the memory that it came in, whatever its form."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fdcr_fast.layout import ParamLayout, as_tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def vector_pieces(
    name: str, values: Any, num_params: int, layout: ParamLayout | None, buffer_dtype: torch.dtype
) -> list[Tensor]:
    """What makes up the client's vector ``[P]``: vectors, or contiguous tensors in the shapes of the parameters.

    They are copied only where torch cannot share the memory, or where the numbers do not lie in their order.

    Args:
        name: Name of the vector in messages.
        values: A tensor or anything that speaks DLPack, a NumPy array, a mapping by parameter name or a sequence in the
            order of the parameters (with a layout), or a buffer (``bytes``, ``bytearray``, ``memoryview``).
        num_params: ``P``.
        layout: Order of the parameters of a mapping.
        buffer_dtype: Dtype of the numbers in a buffer.

    Raises:
        ValueError: it is anything else, or has another length; the message says what came.
    """
    try:
        if isinstance(values, nn.Module):
            raise TypeError("it is a module, whose state is no update (StateStore.put_state takes states)")
        if isinstance(values, Mapping) or (isinstance(values, list | tuple) and layout is not None):
            return _pieces_of(values, layout)
        vector = _from_buffer(values, buffer_dtype) if _is_buffer(values) else plain_tensor(tensor_view(values))
    except Exception as error:  # the object is the client's, and so is whatever it raises
        raise ValueError(f"the {name} is no vector: {shown(error, str)}") from None
    if vector.dtype not in FLOATS:
        raise ValueError(f"the {name} must be floating point (64 bits to 16), got {vector.dtype}")
    if tuple(vector.shape) != (num_params,):
        raise ValueError(f"the {name} must be a vector of {num_params} parameters, got {list(vector.shape)}")
    return [vector]


def matrix(name: str, values: Any) -> Tensor:
    """Clients' vectors ``[K, P]`` from a tensor, an array, or a list of vectors, which is copied.

    Raises:
        TypeError: it is none of these.
        ValueError: the vectors of a list differ in length.
    """
    if isinstance(values, Tensor | np.ndarray):
        return argument(name, values)
    if not isinstance(values, list | tuple):
        raise TypeError(f"expected {name} [K, P] to be a tensor, an array or a list of vectors, got {shown(values)}")
    rows = [argument(name, row) for row in values]
    if len({row.shape for row in rows}) > 1:
        raise ValueError(f"expected {name} to be vectors of one length, got {[list(row.shape) for row in rows]}")
    return torch.stack(rows)


def shown(value: Any, form: Callable[[Any], str] = repr) -> str:
    """A client's object in a message; it may be long, or fail at being shown."""
    try:
        return form(value)[:200]
    except Exception:
        return f"a {type(value).__name__}"


def _pieces_of(values: Mapping[Any, Any] | Sequence[Any], layout: ParamLayout | None) -> list[Tensor]:
    if layout is None:
        raise TypeError(
            "it is a mapping by parameter name, and the store has no layout (layout=ParamLayout.from_module(model))"
        )
    pieces = [plain_tensor(tensor) for tensor in layout.tensors(values)]
    for name, piece in zip(layout.names, pieces, strict=True):
        if piece.dtype not in FLOATS:
            raise TypeError(f"parameter {name} must be floating point, got {piece.dtype}")
    return [piece if piece.is_contiguous() else piece.reshape(-1) for piece in pieces]


def _is_buffer(values: Any) -> bool:
    return isinstance(values, bytes | bytearray | memoryview)


def _from_buffer(values: Any, dtype: torch.dtype) -> Tensor:
    array = np.frombuffer(values, np.uint8)
    if array.size % dtype.itemsize:
        raise ValueError(f"{array.size} bytes are no whole number of {dtype}")
    return _borrowed(array, dtype)


def tensor_view(values: Any) -> Tensor:
    """A tensor, array, or object with ``__dlpack__`` as a tensor that must not be written.

    Unlike :func:`fdcr_fast.layout.as_tensor` it also shares read-only arrays.
    """
    if isinstance(values, Tensor):
        return values
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError("it is a masked array")
    if isinstance(values, np.ndarray) and not values.flags.writeable and values.flags.c_contiguous:
        writable = np.empty(0, values.dtype.newbyteorder("="))
        if values.dtype == writable.dtype:
            return _borrowed(values, torch.from_numpy(writable).dtype).reshape(values.shape)
    return as_tensor(values)


def argument(name: str, values: Any) -> Tensor:
    """:func:`tensor_view` of what the caller gave, by name in the message."""
    try:
        return tensor_view(values)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None


def _borrowed(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """A tensor on read-only memory, which torch would copy or warn about; never to be written."""
    if array.size == 0:
        return torch.empty(0, dtype=dtype)
    memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    memory.owner = array  # type: ignore[attr-defined]  # the tensor keeps `memory`, and so the array, alive
    return torch.frombuffer(memory, dtype=dtype)


def plain_tensor(tensor: Tensor) -> Tensor:
    """The same numbers as a tensor without a class or gradient of its own."""
    if type(tensor) is not Tensor:
        if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(f"a {type(tensor).__name__} has no memory that could be copied")
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.detach().as_subclass(Tensor)
    if tensor.is_meta:
        raise TypeError("it is a tensor without data (device meta)")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse"
        raise TypeError(f"it is a {kind} tensor, not a dense one")
    size = tensor.numel()
    if size and not tensor.is_contiguous():
        size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if size and (tensor.storage_offset() + size) * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise TypeError("its memory was freed")
    return tensor.detach() if tensor.requires_grad else tensor
