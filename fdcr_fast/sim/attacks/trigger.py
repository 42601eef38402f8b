"""Where the pixels of a trigger are."""

Pixels = tuple[tuple[int, int], ...]
PAPER_TRIGGER: Pixels = tuple((row, column) for row in (0, 2) for column in (0, 1, 2, 4, 5, 6))
