"""What the Triton kernels become for NVIDIA GPUs of compute capability 8.0, 9.0 and 10.0: no GPU is needed.

    python -m benchmarks.triton_report            # writes benchmarks/results/triton.md
    python -m benchmarks.triton_report --json     # prints the rows instead

Every operator is called on tensors without data, in sizes that occur. What it would launch is compiled ahead of time,
with the same specialisation as at run time, and the machine code is read with the tools inside the triton package.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
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
from tests.support.gpu.cases import CASES

CAPABILITIES = (80, 90, 100)
RESULTS = Path(__file__).parent / "results" / "triton.md"


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


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


Launch = tuple[str, Any, tuple[Any, ...], dict[str, Any]]


def launches(capability: int) -> Iterator[Launch]:
    """What the cases launch on a device of 132 multiprocessors, without doing it."""
    found: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    before = launch.run, launch.assumed
    launch.assumed = launch.Target(132, capability)
    launch.run = lambda kernel, grid, args, meta: found.append((kernel, args, meta))
    try:
        for case in CASES:
            getattr(kernels, case.operator)(*case.arguments(empty))
            yield from ((case.name, *each) for each in found)
            found.clear()
    finally:
        launch.run, launch.assumed = before


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


def report(workers: int = 2, capabilities: Collection[int] = CAPABILITIES, only: str = "") -> list[Row]:
    todo = [(each, capability) for capability in capabilities for each in launches(capability)]
    todo = [(each, capability) for each, capability in todo if re.search(only, each[0])]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda given: described(*given), todo))


def table(rows: list[Row]) -> str:
    lines = [
        "# The Triton kernels as machine code",
        "",
        f"`python -m benchmarks.triton_report`, triton {triton.__version__}; compiled, never run on a GPU.",
        "Spills: loads and stores of local memory. Loads: instructions by bits per thread.",
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
    parser.add_argument("--capability", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--only", default="", help="a regular expression that calls must contain")
    options = parser.parse_args()
    rows = report(capabilities=options.capability, only=options.only)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        RESULTS.write_text(table(rows))


if __name__ == "__main__":
    main()
