"""In which rounds attackers attack."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

_SPAN = re.compile(r"(?P<first>\d+)(?P<dash>-(?P<last>\d+)?)?(/(?P<step>\d+))?")


def parse_rounds(text: str) -> tuple[range, ...]:
    """Rounds, counted from 1: ``"all"``, or spans with commas: ``A``, ``A-B``, ``A-``, every nth with ``/n``.

    ``"5-"`` starts late, ``"1-/3"`` is every third round, ``"1-4,10-12"`` pauses in between.

    Raises:
        ValueError: what is not of that form, or a span that holds no round.
    """
    return tuple(_parse_span(span.strip()) for span in ("1-" if text == "all" else text).split(","))


def _parse_span(text: str) -> range:
    match = _SPAN.fullmatch(text)
    if match is None:
        raise ValueError(f"expected 'all' or rounds such as 5, 5-9, 5- or 1-/3 with commas, got {text!r}")
    first = int(match["first"])
    last = int(match["last"]) if match["last"] else sys.maxsize - 1 if match["dash"] else first
    step = int(match["step"] or 1)
    if not 1 <= first <= last or step == 0:
        raise ValueError(f"expected rounds counted from 1, first to last, and a step of at least 1, got {text!r}")
    return range(first, last + 1, step)


def attacks_in(rounds: Iterable[range], round: int) -> bool:
    """Whether a round is among the spans."""
    return any(round in span for span in rounds)
