"""What loggers log of a round."""

from __future__ import annotations

from fdcr_fast.sim.run.records import RoundRecord


def scalars(record: RoundRecord) -> dict[str, float]:
    """The figures of a round by name, but for its number; those that are undefined are left out."""
    figures = record.model_dump(exclude={"round"})
    return {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
