"""Random networks, and whether their Fisher is that of plain autograd, one sample at a time."""

from .compare import Verdict, check
from .compose import Network, compose

__all__ = ["Network", "Verdict", "check", "compose"]
