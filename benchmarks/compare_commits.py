"""Is one commit slower than another? Both are built, and their benchmarks take turns in processes of their own.

python -m benchmarks.compare_commits BASE -- benchmarks/bench_fisher.py -k LeNet --threads 1

What comes after ``--`` is for pytest. The benchmarks are those of this checkout, for both: what is compared is the
library, by the same code. One that only one of the two can run is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Times
from benchmarks.tables import markdown_table

ROOT = Path(__file__).parents[1]
DEFAULT = ["benchmarks/bench_aggregation.py", "benchmarks/bench_fisher.py"]
SECONDS = 5  # of one comparison in one process, where pytest is not told otherwise
_WHERE = "import fdcr_fast; print(fdcr_fast.__file__); print(fdcr_fast.backends()['cpu'].reason)"

Least = dict[str, float]  # of the benchmarks of one process: seconds of the round that was disturbed least


@dataclass(frozen=True)
class Change:
    """How the time of one benchmark changed: from pair to pair of processes, that of new over that of base."""

    name: str
    base: Times
    new: Times

    @property
    def ratios(self) -> Times:
        return self.new.ratios(self.base)

    def verdict(self, limit: float) -> str:
        """``slower`` or ``faster`` where all pairs differ by more than the limit."""
        ratios = self.ratios.seconds
        return "slower" if min(ratios) > limit else "faster" if max(ratios) < 1 / limit else ""

    def cells(self, limit: float) -> list[str]:
        low, high = self.ratios.quartiles
        medians = [f"{1e3 * times.median:,.3f}" for times in (self.base, self.new)]
        return [self.name, *medians, f"**{self.ratios.median:.2f}** ({low:.2f} to {high:.2f})", self.verdict(limit)]


def changes(pairs: Sequence[tuple[Least, Least]]) -> list[Change]:
    """Of the benchmarks that all processes have measured; pairs are base and new."""
    common = [name for name in pairs[0][0] if all(name in least for pair in pairs for least in pair)]
    return [
        Change(name, *(Times(tuple(pair[side][name] for pair in pairs)) for side in (0, 1)))  # base, new
        for name in common
    ]


def measure(library: Path, folder: Path, arguments: Sequence[str]) -> Least:
    """The benchmarks in a process of their own, of a library that is in one folder, from another one without any.

    Raises:
        RuntimeError: nothing could be measured.
    """
    report = folder / "measured.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", f"--benchmark-max-time={SECONDS}", *arguments]
    command += [f"--benchmark-json={report}", "--continue-on-collection-errors"]
    process = subprocess.run(
        command, cwd=folder, env=_seeing(library), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not report.exists() or not report.stat().st_size:
        raise RuntimeError(f"nothing was measured of {library}:\n{process.stdout[-3000:]}")
    found = json.loads(report.read_text())["benchmarks"]
    return {benchmark["fullname"]: benchmark["stats"]["min"] for benchmark in found}


def check(library: Path) -> str:
    """The kernels of a library.

    Raises:
        RuntimeError: another one is imported.
    """
    said = subprocess.check_output([sys.executable, "-c", _WHERE], cwd=library, env=_seeing(library), text=True)
    where, kernels = said.splitlines()
    if library.resolve() not in Path(where).resolve().parents:
        raise RuntimeError(f"expected to import {library}, got {where}")
    return kernels


def _seeing(library: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(library)}


@contextmanager
def built(commit: str, folder: Path) -> Iterator[Path]:
    """The library as of a commit, in a folder of its own beside a worktree, which goes in the end."""
    worktree, library = folder / "worktree", folder / "library"
    _git("worktree", "add", "--quiet", "--detach", str(worktree), commit)
    try:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
        subprocess.run([*pip, "--target", str(library), str(worktree)], check=True)
        yield library
    finally:
        _git("worktree", "remove", "--force", str(worktree))


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()


def compare(libraries: Mapping[str, Path], folder: Path, pairs: int, arguments: Sequence[str]) -> list[Change]:
    """Lets the benchmarks of both libraries take turns; whose turn is first changes from pair to pair."""
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results"))
    found: list[tuple[Least, Least]] = []
    for pair in range(pairs):
        least: dict[str, Least] = {}
        for side in ("base", "new") if pair % 2 == 0 else ("new", "base"):
            least[side] = measure(libraries[side], folder, arguments)
            print(f"pair {pair + 1} of {pairs}, {side}: {len(least[side])} benchmarks", flush=True)
        found.append((least["base"], least["new"]))
    return changes(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit")
    parser.add_argument("--new", help="commit; by default this checkout as it is, without files unknown to git")
    parser.add_argument("--pairs", type=int, default=5, help="of processes, at least 2")
    parser.add_argument("--limit", type=float, default=1.05, help="ratio from which on it counts as slower")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no worktree is left
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:cut])
    arguments = sys.argv[cut + 1 :] or DEFAULT
    if options.pairs < 2:
        parser.error("a spread takes at least 2 pairs")
    commits = {"base": options.base, "new": options.new or _git("stash", "create") or "HEAD"}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {side: Path(temporary, side) for side in commits}
        with built(commits["base"], folders["base"]) as base, built(commits["new"], folders["new"]) as new:
            libraries = {"base": base, "new": new}
            kernels = {side: check(library) for side, library in libraries.items()}
            if len(set(kernels.values())) > 1:
                raise SystemExit(f"not comparable: {kernels}")
            found = compare(libraries, Path(temporary), options.pairs, arguments)
    columns = ["benchmark", "base, ms", "new, ms", "new over base", ""]
    print(markdown_table(columns, [change.cells(options.limit) for change in found]))
    if found:
        print(f"\nMedian of all: {statistics.median(change.ratios.median for change in found):.3f}")
    sys.exit(any(change.verdict(options.limit) == "slower" for change in found))


if __name__ == "__main__":
    main()
