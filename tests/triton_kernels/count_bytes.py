"""Counts what interpreted kernels load and store, against the model; run by test_interpreter.py."""

import numpy as np
import torch
from triton.runtime import interpreter

from fdcr_fast.ops import triton as kernels
from fdcr_fast.ops.triton import launch
from tests.support.gpu import cases
from tests.support.gpu.triton_model import bytes_moved

touched: dict[tuple[object, ...], list[np.ndarray]] = {}
current = [0]
builder = interpreter.InterpreterBuilder


def note(self, kind, pointers, mask):
    size = pointers.get_element_ty().primitive_bitwidth // 8
    found = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].ravel()
    touched.setdefault((current[0], self.grid_idx, kind, size), []).append(found)


def load(self, pointers, mask, *rest, original=builder.create_masked_load):
    note(self, "load", pointers, mask)
    return original(self, pointers, mask, *rest)


def store(self, pointers, value, mask, *rest, original=builder.create_masked_store):
    note(self, "store", pointers, mask)
    return original(self, pointers, value, mask, *rest)


def run(*args, original=launch.run):
    current[0] += 1
    original(*args)


builder.create_masked_load, builder.create_masked_store, launch.run = load, store, run


def counted(operator, args):
    """Every byte once for each program that touches it."""
    touched.clear()
    getattr(kernels, operator)(*args)
    return sum(key[-1] * len(np.unique(np.concatenate(found))) for key, found in touched.items())


def make(*shape, dtype=torch.float32):
    return torch.rand(shape, dtype=torch.float64).to(dtype)


BF16 = torch.bfloat16
SMALL = [
    ("discrepancy_and_mean", cases.both(20, 4500)),
    ("discrepancy_and_mean", cases.both(5, 4500, BF16, 16)),
    ("discrepancy_and_mean", cases.both(130, 300, torch.float32, 16)),
    ("discrepancy_and_mean", cases.both(17, 300, torch.float32, 16, False)),
    ("discrepancy", lambda make: cases.scores(make, 3, 777)),
    ("rescaled_mean", lambda make: (make(500), *cases.round_of(make, 7, 500), make(7, dtype=torch.float64) + 1, True)),
    ("importance_range", lambda make: (cases.clients(make, 9, 9000)[0], 9000)),
    ("squared_norm", lambda make: (cases.clients(make, 6, 1000, BF16, 16)[0], 1000)),
    ("fill_row", lambda make: ([make(700), make(9000)], make(2, 5000, dtype=BF16), make(3, dtype=torch.float64))),
    ("central_mean", cases.central(10, 700, 2, False)),
    ("central_mean", cases.central(7, 100, 3, True, 16)),
    ("central_mean", cases.central(40, 300, 2, False, 16)),
    ("gram", cases.gram("fisher_update", 70, 100)),
    ("gram", cases.gram("update", 64, 64)),
    ("sum_squared_grads_linear", cases.layer((3, 20, 70), (3, 20, 130))),
    ("sum_squared_grads_linear", cases.layer((40, 1, 70), (40, 1, 30), dtype=BF16)),
    ("sum_squared_grads_norm", cases.layer(*[(3, 5, 2, 8, 4)] * 2, options=(None, None, 1e-5))),
    ("sum_squared_grads_norm", cases.layer(*[(2, 1, 2, 3, 2500)] * 2, options=(None, None, 1e-5))),
    ("sum_squared_grads_norm", cases.layer(*[(4, 1, 1, 40, 9)] * 2, (1, 40), (1, 40), options=(1e-5,))),
    ("sum_squared_grads_embedding", lambda make: (make(3, 5, 300), (make(3, 5) * 7).long(), 7)),
]

for operator, arguments in SMALL:
    args = arguments(make)
    model, found = bytes_moved(operator, args).moved, counted(operator, args)
    assert found == model, f"{operator}: {found} bytes counted, {model} by the model"
print(len(SMALL), "calls move what the model says")
