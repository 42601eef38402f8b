"""Compiles the CUDA kernels for every capability and reads their machine code: registers, memory, instructions.

    python -m benchmarks.cuda_report [--json] [--objects FOLDER]

Writes ``results/cuda.md``. Needs nvcc, and the ``cuobjdump`` that comes with CUDA or with Triton; no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cuda.md"
CAPABILITIES = (80, 90, 100)
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
FLAGS = [
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror",
]
KERNEL = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)'")


@dataclass(frozen=True)
class Row:
    """A kernel as machine code for one capability; loads of global memory by bits per thread."""

    source: str
    kernel: str
    capability: int
    registers: int
    shared: int
    spills: int
    loads: dict[str, int]
    matrix: list[str]


def cuobjdump() -> str | None:
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        return str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return shutil.which("cuobjdump")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(
            result.stdout[-3000:]
            + "\n".join(line for line in result.stderr.splitlines() if "ptxas info" not in line)[-5000:]
        )
    return result


def readable(symbol: str) -> str:
    """``aggregation<Vectors<float>, float>`` from a mangled name."""
    name = run("c++filt", symbol).stdout.strip().removeprefix("void ")
    return re.sub(r"(fdcr::cuda::|\(anonymous namespace\)::)", "", name).rsplit("(", 1)[0]


def compiled(source: Path, objects: Path) -> list[Row]:
    target = objects / f"{source.stem}.o"
    architectures = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in CAPABILITIES]
    strict = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings"]
    said = run("nvcc", *FLAGS, *strict, *architectures, f"-I{ROOT / 'csrc'}", "-c", source, "-o", target).stderr
    code: dict[tuple[int, str], list[str]] = {}
    capability, symbol = 0, ""
    for line in run(cuobjdump(), "-sass", target).stdout.splitlines():
        if found := re.search(r"code for sm_(\d+)", line):
            capability = int(found[1])
        elif found := re.search(r"Function : (\S+)", line):
            symbol = found[1]
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_.]+)", line):
            code.setdefault((capability, symbol), []).append(found[1])
    rows = []
    for entry in re.split(r"(?=ptxas info\s+: Compiling entry)", said)[1:]:
        symbol, capability = KERNEL.search(entry).groups()  # type: ignore[union-attr]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        used = re.search(r"Used (\d+) registers", entry)
        shared = re.search(r"(\d+) bytes smem", entry)
        instructions = code[int(capability), symbol]
        loads = {"128": 0, "64": 0, "32 or less": 0}
        for name in instructions:
            if name.startswith("LDG"):
                loads["128" if ".128" in name else "64" if ".64" in name else "32 or less"] += 1
        matrix = sorted({name for name in instructions if name.startswith(("HMMA", "DMMA"))})
        rows.append(
            Row(
                source.name,
                readable(symbol),
                int(capability),
                int(used[1]),  # type: ignore[index]
                int(shared[1]) if shared else 0,
                int(spills[1]) + int(spills[2]) + sum(name.startswith(("LDL", "STL")) for name in instructions),  # type: ignore[index]
                loads,
                matrix,
            )
        )
    return rows


def report(objects: Path, workers: int = 2) -> list[Row]:
    with ThreadPoolExecutor(workers) as pool:
        return [row for rows in pool.map(lambda source: compiled(source, objects), SOURCES) for row in rows]


def table(rows: list[Row]) -> str:
    version = re.search(r"release ([\d.]+)", run("nvcc", "--version").stdout)
    lines = [
        "# The CUDA kernels as machine code",
        "",
        f"`python -m benchmarks.cuda_report`, nvcc {version[1] if version else '?'}, 128 threads per block; compiled, "
        "never run on a GPU.",
        "Spills: bytes, and loads and stores of local memory. Loads: instructions by bits per thread.",
        "",
        "| kernel | capability | registers | shared memory | spills | loads | matrix instructions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (row.source, row.kernel, row.capability)):
        loads = ", ".join(f"{n} x {bits}" for bits, n in row.loads.items() if n)
        cells = row.kernel, row.capability / 10, row.registers, row.shared, row.spills, loads, ", ".join(row.matrix)
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the rows and write nothing")
    parser.add_argument("--objects", type=Path, help="leave the compiled objects there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = report(options.objects or Path(folder))
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        RESULTS.write_text(table(rows))


if __name__ == "__main__":
    main()
