"""The CUDA kernels on the host: small calls of awkward shapes against the reference in float64, and what they move.

python -m tests.cuda_on_host.check LIBRARY [values] [counts] [race]

The tests beside it run it with FDCR_FAST_BACKEND=reference.
"""

import ctypes
import itertools
import sys

import torch
from torch.utils._pytree import tree_map

from fdcr_fast.ops.operator import OPERATORS
from tests.support.gpu import cases
from tests.support.gpu.cuda_model import bytes_moved

LIBRARY = ctypes.CDLL(sys.argv[1])
torch.ops.load_library(sys.argv[1])
torch.set_num_threads(1)
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
TYPES = itertools.cycle([F32, BF16, F64, F16])


def make(*shape, dtype=F32):
    return torch.rand(shape, dtype=F64).to(dtype)


def layers():
    """Linear layers and convolutions: nothing, one of everything, more than a tile, every type, every geometry."""
    for shape in ((0, 3, 4, 5), (1, 1, 1, 1), (2, 33, 70, 65), (35, 1, 3, 66), (3, 5, 4, 0)):
        n, t, out, into = shape
        yield "sum_squared_grads_linear", (make(n, t, out, dtype=next(TYPES)), make(n, t, into, dtype=next(TYPES)))
    yield "sum_squared_grads_linear", (make(3, 4, 9).transpose(1, 2), make(3, 5, 9).transpose(1, 2))
    for groups, kernel, stride, padding, dilation in (
        (1, (3, 3), (1, 1), (1, 1), (1, 1)),
        (2, (2, 3), (3, 1), (0, 2), (2, 1)),
        (3, (1, 1), (2, 2), (0, 0), (1, 1)),
    ):
        x = make(2, 4 * groups, 9, 8, dtype=next(TYPES))
        weight = make(5 * groups, 4, *kernel)
        out = torch.nn.functional.conv2d(x.float(), weight, None, stride, padding, dilation, groups)
        grad = make(*out.shape, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
        yield "sum_squared_grads_conv", (grad, x, kernel, stride, padding, dilation, groups)


def rounds():
    """Clients in rows and tiles, aligned or not, held in registers or not, every type, one or many."""
    for K, P, tile, dtype, single in (
        (1, 1, None, F32, True),
        (5, 2500, None, F32, True),
        (3, 131, None, F32, False),
        (34, 70, 16, F32, False),
        (9, 300, 16, BF16, True),
        (9, 77, 16, F16, True),
        (5, 65, 7, BF16, False),
        (33, 40, 2, F64, False),
        (260, 70, 16, F32, True),
    ):
        yield "discrepancy_and_mean", cases.both(K, P, dtype, tile, single)(make)
        updates, fishers = cases.clients(make, K, P, dtype, tile)
        yield "importance_range", (fishers, P)
        yield "squared_norm", (updates, P)
    yield "discrepancy", cases.scores(make, 3, 777)
    yield "rescaled_mean", (make(500, dtype=BF16), *cases.round_of(make, 7, 500), make(7, dtype=F64) + 1, True)


def grams():
    for transform, K, P in (("update", 3, 100), ("fisher_update", 70, 37), ("reweighted_update", 1, 33)):
        yield "gram", cases.gram(transform, K, P)(make)
    u, f, low, high = cases.round_of(make, 5, 90, F16)
    ranges = [torch.tensor([[3, 5], [40, 90]]), torch.empty(0, 2, dtype=torch.int64)]
    read = torch.tensor([True, False, True, True, True])
    for single in (True, False):
        yield "gram", (u, f, low, high, read, ["fourth_root_fisher", "update"], ranges, make(2, 1, 1, dtype=F64).expand(
            2, 5, 5), 90, single)  # fmt: skip


def values():
    for operator, args in itertools.chain(layers(), rounds(), grams()):
        exact = OPERATORS[operator].reference(*tree_map(in_float64, args))
        found = getattr(torch.ops.fdcr_fast, operator)(*args)
        given = {x.dtype for x in args if isinstance(x, torch.Tensor)}
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, exact)), strict=True):
            limit = {BF16: 4e-3, F16: 5e-4, F32: 2e-6}.get(one.dtype, 2e-6 if given != {F64} else 1e-12)
            assert torch.equal(one.isnan(), other.isnan()), (operator, found, exact)
            error = (one.double() - other).nan_to_num().norm() / other.nan_to_num().norm().clamp(min=1e-300)
            assert error < limit, (operator, [x.shape for x in args if isinstance(x, torch.Tensor)], error)
    print("values are right", flush=True)


def in_float64(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def counts():
    moved, products = ctypes.c_int64(), ctypes.c_int64()
    for operator, args in itertools.chain(layers(), rounds(), grams()):
        LIBRARY.fdcr_start_counting()
        getattr(torch.ops.fdcr_fast, operator)(*args)
        LIBRARY.fdcr_stop_counting(ctypes.byref(moved), ctypes.byref(products))
        if args[0].numel() == 0 or (operator == "gram" and not args[4].all()):
            continue  # the model is of calls that read everybody
        model = bytes_moved(operator, args, multiprocessors=2)
        shapes = [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]
        assert products.value == model.products, (
            f"{operator} {shapes}: {products.value} products, {model.products} by the model"
        )
        if operator == "sum_squared_grads_conv":  # whose windows overlap
            assert moved.value <= model.moved, f"{operator} {shapes}: {moved.value} bytes, {model.moved} by the model"
        else:
            assert moved.value == model.moved, f"{operator} {shapes}: {moved.value} bytes, {model.moved} by the model"
    print("calls move what the model says")


def race():
    LIBRARY.fdcr_planted_race(ctypes.byref(ctypes.c_int64()))


for name in sys.argv[2:]:
    {"values": values, "counts": counts, "race": race}[name]()
