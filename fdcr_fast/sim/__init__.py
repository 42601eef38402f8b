"""Federated simulator: clients, attackers and a server in one process. Needs the extra ``fdcr_fast[sim]``."""

from typing import TYPE_CHECKING

from fdcr_fast._lazy import public_names

if TYPE_CHECKING:
    from fdcr_fast.sim._public import *  # noqa: F403
    from fdcr_fast.sim._public import __all__ as __all__
else:
    __getattr__, __dir__ = public_names(__name__)
