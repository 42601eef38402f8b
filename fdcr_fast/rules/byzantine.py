"""What rules have in common that assume how many clients may send anything."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.rules.base import AggregationRule
from fdcr_fast.rules.server_options import ServerOptions

_ROUNDING = 1e-9  # 0.3 of 10 clients are 3


@dataclass(frozen=True, kw_only=True)
class ByzantineRule(AggregationRule):
    """A rule that tolerates ``f`` Byzantine clients, a number that the server assumes and everybody may know.

    Args:
        num_byzantine: ``f``, or a fraction below 1/2: the share of a round's clients, rounded down.
        norm_bound: Largest update norm in units of the median norm, beyond which clients are rejected; by default none.
    """

    weighs_samples = False
    num_byzantine: int | float
    norm_bound: float | None = None

    def __post_init__(self) -> None:
        self._check_options()
        f = self.num_byzantine
        if not (f >= 0 if isinstance(f, Integral) else 0 <= f < 0.5):
            raise ValueError(f"num_byzantine must be a number of clients, 0 or more, or a share below 0.5, got {f!r}")

    @classmethod
    def from_options(cls, options: ServerOptions) -> ByzantineRule:
        """The rule that assumes as many Byzantine clients as the server does."""
        return cls(num_byzantine=options.num_byzantine)

    @classmethod
    def min_clients(cls, num_byzantine: int) -> int:
        """``2 f + 1``: else honest clients are no majority."""
        return 2 * num_byzantine + 1

    def tolerated(self, clients: ClientUpdates) -> int:
        """How many of the valid clients may be Byzantine: ``f``, or fewer where clients were rejected.

        A round is large enough or not by who took part: no client can stop it by sending what is rejected.

        Raises:
            ValueError: fewer than :meth:`min_clients` took part.
        """
        took_part = len({*clients.clients, *clients.rejected})
        f = self.num_byzantine
        f = int(f) if isinstance(f, Integral) else int(f * took_part + _ROUNDING)
        if took_part < self.min_clients(f):
            raise ValueError(
                f"{type(self).__name__} with num_byzantine={f} needs at least {self.min_clients(f)} clients, "
                f"got {took_part}: take a smaller number, or a share of the round's clients, such as 0.2"
            )
        valid = int(clients.valid.sum())
        while f > 0 and valid < self.min_clients(f):
            f -= 1
        return f
