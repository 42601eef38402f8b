"""What rules have in common that assume how many clients may send anything."""

from __future__ import annotations

from dataclasses import dataclass

from fdcr_fast.server.intake import ClientUpdates
from fdcr_fast.server.rules import AggregationRule


@dataclass(frozen=True, kw_only=True)
class ByzantineRule(AggregationRule):
    """A rule that tolerates ``f`` Byzantine clients, a number that the server assumes and everybody may know.

    Args:
        num_byzantine: ``f``.
        norm_bound: See :class:`fdcr_fast.FDCR`; by default no bound.
    """

    num_byzantine: int
    norm_bound: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        if isinstance(self.num_byzantine, bool) or not isinstance(self.num_byzantine, int) or self.num_byzantine < 0:
            raise ValueError(f"num_byzantine must be a number of clients, 0 or more, got {self.num_byzantine!r}")

    @classmethod
    def min_clients(cls, num_byzantine: int) -> int:
        """Fewest clients of a round in which so many may be Byzantine."""
        return 2 * num_byzantine + 1

    def tolerated(self, clients: ClientUpdates) -> int:
        """How many of the valid clients may be Byzantine: ``f``, or fewer where clients were rejected.

        A round is large enough or not by who took part: no client can stop it by sending what is rejected.

        Raises:
            ValueError: fewer than :meth:`min_clients` took part.
        """
        f, took_part = self.num_byzantine, len({*clients.clients, *clients.rejected})
        if took_part < self.min_clients(f):
            raise ValueError(
                f"{type(self).__name__} with num_byzantine={f} needs at least {self.min_clients(f)} clients, "
                f"got {took_part}"
            )
        valid = int(clients.valid.sum())
        while f > 0 and valid < self.min_clients(f):
            f -= 1
        return f
