"""Compare the Fishers of random networks with plain autograd, one sample at a time.

    python -m tests.fisher.fuzz_networks NETWORKS [START] [--jobs JOBS] [--show KIND] [--shrink]

Networks are numbered from START. Prints the number and the code of each that fails: numbers that differ, an error
that is no clear refusal, or a model, state or data that are not as before. At the end: how many were refused, by
message, and how often each building block occurred and failed. ``--shrink`` prints a smaller network that fails in
the same way instead.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tests.support.fisher.random_networks import Network, Verdict, check, compose


class Recorded:
    """A chance that can be repeated with changes; 0 for what is not there."""

    def __init__(self, answers: Iterable[int] = (), chance: random.Random | None = None) -> None:
        self.answers, self.chance, self.asked = list(answers), chance, 0

    def randrange(self, stop: int) -> int:
        if self.asked == len(self.answers):
            self.answers.append(self.chance.randrange(stop) if self.chance else 0)
        self.asked += 1
        return self.answers[self.asked - 1] % stop


def verdict_of(chance: Any) -> tuple[Network | None, Verdict]:
    """What does not even compose is invalid."""
    try:
        made = compose(chance)
    except Exception as error:
        return None, Verdict("invalid", f"not composed: {error}")
    with made:
        return made, check(made)


def kind_of(verdict: Verdict) -> str:
    """By which failures are counted: without names and numbers of a particular network."""
    text = re.sub(r"(?<![a-z])[a-z]+\d+(\.\w+)*", "X", verdict.text.partition(";")[0])
    return f"{verdict.kind}: {re.sub(r'[-+]?[0-9][0-9.e+-]*', '#', text)[:110]}"


def shrunk(number: int, wanted: Callable[[Verdict], bool], seconds: float = 30) -> Network:
    """A network of fewer and smaller answers of which the same is true."""
    first = Recorded(chance=random.Random(number))
    with compose(first):
        pass
    best, end = first.answers, time.monotonic() + seconds

    def try_(answers: list[int]) -> bool:
        nonlocal best
        trial = Recorded(answers)
        made, verdict = verdict_of(trial)
        if made is None or not wanted(verdict):
            return False
        smaller = trial.answers[: trial.asked]
        while smaller and smaller[-1] == 0:
            smaller.pop()
        if (len(smaller), smaller) >= (len(best), best):
            return False
        best = smaller
        return True

    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for length in (16, 8, 4, 2, 1):
            i = len(best)
            while i > 0 and time.monotonic() < end:
                i -= 1
                progress |= try_(best[:i] + best[i + length :])
                if i < len(best) and length == 1 and best[i]:
                    progress |= try_([*best[:i], 0, *best[i + 1 :]]) or try_([*best[:i], best[i] // 2, *best[i + 1 :]])
    with compose(Recorded(best)) as smaller:
        return smaller


def one(number: int) -> tuple[int, str, Verdict, Counter[str]]:
    torch.set_num_threads(1)  # tensors are so small that threads are more work than the numbers
    made, verdict = verdict_of(random.Random(number))
    return number, "" if made is None else made.script, verdict, Counter() if made is None else made.seen


def fuzz(numbers: Iterable[int], jobs: int = 1) -> Iterable[tuple[int, str, Verdict, Counter[str]]]:
    if jobs == 1:
        yield from map(one, numbers)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(one, numbers, chunksize=50)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=int)
    parser.add_argument("start", type=int, nargs="?", default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", help="also print networks of this kind, such as refused or invalid")
    parser.add_argument("--shrink", action="store_true")
    options = parser.parse_args()
    kinds: Counter[str] = Counter()
    examples: dict[str, list[int]] = {}
    seen: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    began = time.monotonic()
    for number, code, verdict, blocks in fuzz(range(options.start, options.start + options.networks), options.jobs):
        kind = verdict.kind if verdict.kind == "same" else kind_of(verdict)
        kinds[kind] += 1
        examples.setdefault(kind, []).append(number)
        seen.update(blocks.keys())
        failed.update(blocks.keys() if verdict.failed else ())
        if (verdict.failed and len(examples[kind]) <= 3) or verdict.kind == options.show:
            if options.shrink:
                code = shrunk(number, lambda other, kind=kind: kind_of(other) == kind).script
            print(f"# network {number}: {verdict.kind}: {verdict.text}\n{code}\n", flush=True)
    print(f"{'occurred':>9} {'failed':>7}")
    for name, times in seen.most_common():
        print(f"{times:9} {failed[name]:7} {name}")
    print()
    for kind, times in kinds.most_common():
        print(f"{times:9} {kind}   {examples[kind][:4] if kind != 'same' else ''}")
    milliseconds = 1000 * (time.monotonic() - began) / options.networks
    failures = sum(times for kind, times in kinds.items() if kind.startswith(("different", "crash", "changed")))
    print(f"{failures} of {options.networks} networks failed; {milliseconds:.1f} ms each")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
