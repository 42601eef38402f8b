"""What a call moves and multiplies, and how fast an H100 would be at best."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes that the kernels of an operator move, the least that any could, and multiply-adds of matrix products.

    Products of float32 count once by the model of the Triton kernels, and by that of the CUDA kernels as they are
    formed: three times.
    """

    moved: int
    least: int
    products: int = 0


# Of an H100 SXM by its data sheet: bytes, and multiply-adds of TF32, a second.
BANDWIDTH, TF32 = 3.35e12, 247e12


def predicted_seconds(traffic: Traffic, as_formed: bool = False) -> float:
    """On an H100, were it limited by nothing but memory and matrix products: a bound, not a measurement."""
    return max(traffic.moved / BANDWIDTH, traffic.products * (1 if as_formed else 3) / TF32)
