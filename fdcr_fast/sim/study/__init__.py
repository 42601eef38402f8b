"""Studies: many simulations described by one YAML file, run side by side, summed up in tables and figures."""

from typing import TYPE_CHECKING

from fdcr_fast._lazy import public_names

if TYPE_CHECKING:
    from fdcr_fast.sim.study._public import *  # noqa: F403
    from fdcr_fast.sim.study._public import __all__ as __all__
else:
    __getattr__, __dir__ = public_names(__name__)
