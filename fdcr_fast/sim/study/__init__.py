"""Studies: many simulations described by one YAML file, run side by side, summed up in tables and figures."""

from fdcr_fast.sim.study.pool import StudyEvent, StudyProgress, execute, pending
from fdcr_fast.sim.study.readiness import check
from fdcr_fast.sim.study.results import StudyResults
from fdcr_fast.sim.study.spec import SCALES, Row, Run, Setting, Study, select, shipped_studies

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
