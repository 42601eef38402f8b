"""The public names of :mod:`fdcr_fast.sim.study`."""

from fdcr_fast.sim.study.paper import SCALES, shipped_studies
from fdcr_fast.sim.study.pool import StudyEvent, StudyProgress, execute, pending
from fdcr_fast.sim.study.readiness import check
from fdcr_fast.sim.study.results import StudyResults
from fdcr_fast.sim.study.spec import Row, Run, Setting, Study, select

__all__ = [
    "SCALES",
    "Row",
    "Run",
    "Setting",
    "Study",
    "StudyEvent",
    "StudyProgress",
    "StudyResults",
    "check",
    "execute",
    "pending",
    "select",
    "shipped_studies",
]
