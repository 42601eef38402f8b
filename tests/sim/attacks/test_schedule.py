from __future__ import annotations

import pytest

from fdcr_fast.sim.attacks.schedule import attacks_in, parse_rounds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", set(range(1, 21))),
        ("5", {5}),
        ("5-", set(range(5, 21))),
        ("5-9", {5, 6, 7, 8, 9}),
        ("1-/3", {1, 4, 7, 10, 13, 16, 19}),
        ("2-9/4", {2, 6}),
        ("1-2, 5,18-", {1, 2, 5, 18, 19, 20}),
        ("3-3", {3}),
        ("1-5,4-6", {1, 2, 3, 4, 5, 6}),
    ],
)
def test_rounds_are_counted_from_one_and_inclusive(text: str, expected: set[int]) -> None:
    spans = parse_rounds(text)
    assert {round for round in range(1, 21) if attacks_in(spans, round)} == expected


@pytest.mark.parametrize("text", ["", "x", "-3", "5-9-", "1,,2", "5/", "1-/x", "all,3", "1.5", "5 9"])
def test_what_is_not_rounds_is_shown(text: str) -> None:
    with pytest.raises(ValueError, match="expected 'all' or rounds such as 5, 5-9, 5- or 1-/3 with commas, got '"):
        parse_rounds(text)


@pytest.mark.parametrize("text", ["0-3", "9-5", "1-/0", "0"])
def test_impossible_spans_are_shown(text: str) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        parse_rounds(text)
