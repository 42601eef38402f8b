"""What the Triton kernels become for NVIDIA GPUs of compute capability 8.0, 9.0 and 10.0: no GPU is needed.

    python benchmarks/triton_report.py            # writes benchmarks/results/triton.md
    python benchmarks/triton_report.py --json     # prints the rows instead

Every operator is called on tensors without data, in sizes that occur. What it would launch is compiled ahead of time,
with the same specialisation as at run time, and the machine code is read with the tools inside the triton package.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fdcr_fast.ops import triton as kernels
from fdcr_fast.ops.triton import launch

CAPABILITIES = (80, 90, 100)
RESULTS = Path(__file__).parent / "results" / "triton.md"
REGISTERS, SHARED = 255, 99 << 10  # of a thread; of a program, such that two run side by side on each of them


@dataclass(frozen=True)
class Row:
    """One compiled kernel: its name, and what its machine code holds."""

    case: str
    kernel: str
    capability: int
    warps: int
    registers: int
    shared: int
    spills: int  # loads and stores of local memory
    loads: dict[str, int]  # global loads by bits per thread
    tensor_core: str  # the matrix instruction, if there is one

    @property
    def wide(self) -> bool:
        """Whether all loads of more than a scalar are 128 bits wide."""
        return self.loads.get("128", 0) > 0


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> dict[str, Callable[[], object]]:
    """Calls of every operator. What is said of kernels in the tests goes by these names."""
    half, double = torch.bfloat16, torch.float64

    def clients(K: int, P: int, dtype: torch.dtype = torch.float32, tile: int | None = None) -> tuple[Tensor, Tensor]:
        data = empty(1, 2, K, P, dtype=dtype).transpose(1, 2)
        if tile is not None:
            data = empty(-(-P // tile), K, 2, tile, dtype=dtype)
        return data[:, :, 1], data[:, :, 0]

    def round_of(K: int, P: int, dtype: torch.dtype = torch.float32, tile: int | None = None) -> tuple[Any, ...]:
        return *clients(K, P, dtype, tile), empty(K, dtype=double), empty(K, dtype=double)

    def both(K: int, P: int, dtype: torch.dtype = torch.float32, tile: int | None = None, single: bool = True) -> object:
        alpha = empty(K, dtype=double)
        totals = empty(2 * K + 1, dtype=double)
        options = alpha, alpha, totals, True, True, single
        return kernels.discrepancy_and_mean(empty(P), *round_of(K, P, dtype, tile), *options)

    def scores(K: int, P: int) -> object:
        alpha, totals = empty(K, dtype=double), empty(2 * K + 1, dtype=double)
        return kernels.discrepancy(*round_of(K, P), alpha, totals, P, True)

    def gram(transform: str) -> object:
        read, total = torch.ones(200, dtype=torch.bool, device="meta"), empty(1, 200, 200, dtype=double)
        ranges = [torch.tensor([[0, 1_000_000]])]
        return kernels.gram(*round_of(200, 1_000_000), read, [transform], ranges, total, 1_000_000, False)

    def linear(n: int, t: int, o: int, i: int, dtype: torch.dtype = torch.float32) -> object:
        return kernels.sum_squared_grads_linear(empty(n, t, o, dtype=dtype), empty(n, t, i, dtype=dtype))

    def conv(n: int, o: int, c: int, size: int, dtype: torch.dtype = torch.float32) -> object:
        g, x = empty(n, o, size, size, dtype=dtype), empty(n, c, size, size, dtype=dtype)
        return kernels.sum_squared_grads_conv(g, x, (3, 3), (1, 1), (1, 1), (1, 1), 1)

    def norm(*shape: int, given: bool = False) -> object:
        statistics = empty(*shape[2:4]) if given else None
        return kernels.sum_squared_grads_norm(empty(*shape), empty(*shape), statistics, statistics, 1e-5)

    K, P = 100, 1_000_000
    return {
        "discrepancy_and_mean, [K, P]": lambda: both(K, P),
        "discrepancy_and_mean, tiles of 16": lambda: both(K, P, tile=16),
        "discrepancy_and_mean, tiles of 16, bfloat16": lambda: both(K, P, half, 16),
        "discrepancy_and_mean, tiles of 16, float64 products": lambda: both(K, P, tile=16, single=False),
        "discrepancy_and_mean, K = 1000": lambda: both(1000, P, tile=16),
        "discrepancy_and_mean, K = 10": lambda: both(10, P, tile=16),
        "discrepancy, [K, P]": lambda: scores(K, P),
        "rescaled_mean, [K, P]": lambda: kernels.rescaled_mean(
            empty(P), *round_of(K, P), empty(K, dtype=double), True
        ),
        "importance_range, [K, P]": lambda: kernels.importance_range(clients(K, P)[0], P),
        "squared_norm, tiles of 16": lambda: kernels.squared_norm(clients(K, P, tile=16)[0], P),
        "fill_row, bfloat16 tiles": lambda: kernels.fill_row(
            [empty(P)], clients(K, P, half, 16)[0][:, 0], empty(3, dtype=double)
        ),
        "gram, update": lambda: gram("update"),
        "gram, fisher_update": lambda: gram("fisher_update"),
        "linear, 128 positions": lambda: linear(32, 128, 1024, 256),
        "linear, 128 positions, bfloat16": lambda: linear(32, 128, 1024, 256, half),
        "linear, one position": lambda: linear(256, 1, 120, 400),
        "convolution 3x3": lambda: conv(128, 128, 64, 16),
        "convolution 3x3, float16": lambda: conv(128, 128, 64, 16, torch.float16),
        "LayerNorm": lambda: norm(32, 128, 1, 256, 1),
        "GroupNorm, large groups": lambda: norm(32, 1, 8, 16, 1024),
        "BatchNorm": lambda: norm(64, 1, 1, 64, 1024, given=True),
        "embedding": lambda: kernels.sum_squared_grads_embedding(
            empty(32, 128, 256), torch.empty(32, 128, dtype=torch.int64, device="meta"), 4096
        ),
    }


Launch = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def launches() -> Iterator[Launch]:
    """What the cases launch, without doing it."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    before = launch.run
    launch.run = lambda kernel, grid, args, meta: found.append((kernel, args, meta))
    try:
        for case, call in cases().items():
            call()
            yield from ((case, *each) for each in found)
            found.clear()
    finally:
        launch.run = before


def compiled(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], capability: int) -> Any:
    """The kernel as it would be compiled where these arguments are given."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bound, specialisation, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **meta
    )
    options, signature, constexprs, attrs = kernel._pack_args(backend, meta, bound, specialisation, options)
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def described(each: Launch, capability: int) -> Row:
    case, kernel, args, meta = each
    code = compiled(kernel, args, meta, capability)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(code.asm["cubin"])
        sass, usage = tool("cuobjdump", "-sass", str(file)), tool("cuobjdump", "-res-usage", str(file))
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M)
    loads: dict[str, int] = {}
    for name in instructions:
        if name.startswith(("LDG", "LDGSTS")):
            bits = next((b for b in ("128", "64", "256") if f".{b}" in name), "32 or less")
            loads[bits] = loads.get(bits, 0) + 1
    matrix = {name for name in instructions if re.match(r"[A-Z]*(HMMA|DMMA|GMMA|UTC\w*MMA|QMMA)", name)}
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return Row(
        case,
        kernel.__name__,
        capability,
        code.metadata.num_warps,
        int(registers[1]),
        code.metadata.shared,
        sum(name.startswith(("LDL", "STL")) for name in instructions),
        loads,
        ", ".join(sorted(matrix)),
    )


def report(workers: int = 2) -> list[Row]:
    todo = [(each, capability) for each in launches() for capability in CAPABILITIES]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda given: described(*given), todo))


def table(rows: list[Row]) -> str:
    lines = [
        "# The Triton kernels as machine code",
        "",
        f"`python benchmarks/triton_report.py`, triton {triton.__version__}; compiled, never run on a GPU. Spills: loads",
        "and stores of local memory. Loads: instructions by bits per thread.",
        "",
        "| call | kernel | capability | warps | registers | shared memory | spills | loads | matrix instructions |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        loads = ", ".join(f"{n} x {bits}" for bits, n in sorted(row.loads.items()))
        cells = (
            row.case, row.kernel, f"{row.capability / 10}", row.warps, row.registers, row.shared, row.spills, loads,
            row.tensor_core,
        )  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows and write nothing")
    rows = report()
    if parser.parse_args().json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        RESULTS.write_text(table(rows))


if __name__ == "__main__":
    main()
