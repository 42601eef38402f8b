"""The clients' uploads of one round, validated as they arrive, in the order in which they are aggregated."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from fdcr_fast.layout import ParamLayout
from fdcr_fast.round.arguments import plain_id
from fdcr_fast.round.client_updates import ClientUpdates
from fdcr_fast.round.screening import OnInvalid, refuse
from fdcr_fast.round.tiles import MatrixTiles
from fdcr_fast.store.attendance import Attendance
from fdcr_fast.store.file.rows import FileRows
from fdcr_fast.store.new_rows import check_file_arguments, memory_shape, new_rows
from fdcr_fast.store.row_writer import RowWriter, check_layout
from fdcr_fast.store.rows import FISHER, UPDATE, Accepted, Contribution, Rows, as_dtype, check_integer
from fdcr_fast.warning import callers_level


class UpdateStore:
    """Updates and Fishers of up to ``capacity`` clients, each in tiles ``[T, capacity, L]``.

    Parameter ``p`` lies in tile ``p // L`` at ``p % L``, so that every pass over all clients reads memory or file in
    sequence, and what one pass read of a tile is still cached for the next. A contribution is validated in the one
    pass that copies it. All methods may be called from many threads at once; contributions are then copied side by
    side, and views that the store has given out hold until a client is removed or replaced or the store is cleared.

    **Rounds.** A store holds one round. ``AggregationRule.aggregate`` ends it: what was put stays there to be looked at
    or aggregated by another rule, until the next contribution begins the next round, as :meth:`clear` does.

    **Order.** Clients lie in rows in the order in which their ``put`` began, or where ``row`` says; where one was
    rejected or removed, a later client takes the row, or else the last one moves there. The order decides how sums
    are rounded, nothing else.

    **Files.** With ``path`` the rows lie in a new file (docs/store-format.md) that may be larger than memory, and rules
    read it span by span. When ``put`` has returned, the contribution outlives a crash. Ids are then str or int. What
    was rejected is not written down.

    Args:
        num_params: ``P``, or the layout.
        capacity: Largest number of accepted clients in a round.
        dtype: Dtype of the updates and Fishers that are kept: float32, float64, bfloat16 or float16, also by name.
        tile: ``L``; by default such that a tile of all clients fits into cache.
        device: Device on which they are kept.
        compute_device: Device on which rules read them, by default the same. A store on the CPU for a GPU lies in
            pinned memory and may be larger than that of the GPU, which takes 128 MiB or two tiles of all clients at a
            time.
        with_fishers: False for a store without Fishers, for rules that need none; half the memory. Fishers that are
            given all the same are ignored, once with a warning.
        layout: Names and shapes of the parameters, so that clients may send mappings by name.
        buffer_dtype: Dtype of the numbers in raw buffers (``bytes``); by default ``dtype``.
        on_invalid: ``"reject"`` records a contribution that cannot be used; ``"raise"`` raises ValueError as well.
        path: Path of a file to create; None for memory.
        max_resident: With ``path``, bytes that the buffers may take through which it is read, and each ``put`` writes;
            by default 256 MiB, or more where many clients need it.
        sync: With ``path``, False trades crash safety for speed: nothing is flushed to the disk before the system does.
        shared: Whether other processes can fill rows; see :meth:`writer`.
        copy: False for a store that takes no memory: contributions stay in the tensors that were put, which must not
            change before ``aggregate`` reads them there and sees whether they can be used (as its ``on_invalid`` says).
        cleared: Whether :meth:`clear` must begin every round after the first: what is put into one that was aggregated
            raises RuntimeError then.

    Raises:
        TypeError: an argument is of another type than it can be.
        ValueError: a size is not positive, options exclude each other, memory cannot be pinned for the compute device,
            or what is left of it does not hold the store.
        FileExistsError: there is a file at ``path``; see :meth:`open`.
    """

    def __init__(
        self,
        num_params: int | ParamLayout,
        capacity: int,
        dtype: torch.dtype | str = torch.float32,
        *,
        tile: int | None = None,
        device: torch.device | str = "cpu",
        compute_device: torch.device | str | None = None,
        with_fishers: bool = True,
        layout: ParamLayout | None = None,
        buffer_dtype: torch.dtype | str | None = None,
        on_invalid: OnInvalid = "reject",
        path: str | os.PathLike[str] | None = None,
        max_resident: int | None = None,
        sync: bool = True,
        shared: bool = False,
        copy: bool = True,
        cleared: bool = False,
    ) -> None:
        if isinstance(num_params, ParamLayout):
            layout, num_params = num_params if layout is None else layout, num_params.numel
        dtype = as_dtype("dtype", dtype)
        buffer_dtype = dtype if buffer_dtype is None else as_dtype("buffer_dtype", buffer_dtype)
        check_layout(layout, num_params)
        refuse({}, on_invalid)
        if on_invalid == "raise" and not copy:
            raise ValueError('numbers that are not copied are not looked at by put: give aggregate on_invalid="raise"')
        rows = new_rows(  # last, since it may make a file
            num_params,
            capacity,
            dtype,
            tile=tile,
            device=device,
            compute_device=compute_device,
            with_fishers=with_fishers,
            path=path,
            max_resident=max_resident,
            sync=sync,
            shared=shared,
            copy=copy,
        )
        self._start(rows, RowWriter(rows, layout, buffer_dtype), Attendance(rows, {}, False, on_invalid, cleared))

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["r", "r+"] = "r",
        *,
        layout: ParamLayout | None = None,
        buffer_dtype: torch.dtype | str | None = None,
        on_invalid: OnInvalid = "reject",
        max_resident: int | None = None,
        sync: bool = True,
        verify: bool = False,
    ) -> UpdateStore:
        """The store in a file: exactly the clients whose ``put`` had returned when it was last written.

        Args:
            path: Path of the file.
            mode: ``"r"`` reads what is there now, also while another process writes; if that process then removes or
                replaces clients, reading raises RuntimeError instead of giving a mixture. ``"r+"`` goes on writing;
                only one process can.
            layout: Option as of a new store, and so are ``buffer_dtype``, ``on_invalid``, ``max_resident``, ``sync``.
            verify: Whether all data are read and their checksums compared.

        Raises:
            ValueError: it is no store, or it is damaged; the message says where.
            BlockingIOError: another process has it open for writing, and so would this one.
        """
        if mode not in ("r", "r+"):
            raise ValueError(f"mode must be 'r' or 'r+', got {mode!r}")
        check_file_arguments(path, max_resident)
        refuse({}, on_invalid)
        rows, accepted = FileRows.open(path, mode == "r+", max_resident, sync, verify)
        shape = rows.shape
        check_layout(layout, shape.num_params)
        numbers = shape.dtype if buffer_dtype is None else as_dtype("buffer_dtype", buffer_dtype)
        store = cls.__new__(cls)
        attendance = Attendance(rows, accepted, rows.round_ended(), on_invalid)
        store._start(rows, RowWriter(rows, layout, numbers), attendance)
        return store

    @staticmethod
    def required_bytes(
        num_params: int,
        capacity: int,
        dtype: torch.dtype | str = torch.float32,
        *,
        tile: int | None = None,
        with_fishers: bool = True,
    ) -> int:
        """Memory that such a store takes, ``nbytes``, without making it."""
        return memory_shape(num_params, capacity, as_dtype("dtype", dtype), tile, with_fishers).nbytes

    def _start(self, rows: Rows, writer: RowWriter, attendance: Attendance) -> None:
        self._rows, self._writer, self._attendance = rows, writer, attendance
        self._warned = False

    def __enter__(self) -> UpdateStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._attendance.accepted)

    def __contains__(self, client_id: Hashable) -> bool:
        return client_id in self._attendance.accepted

    def __iter__(self) -> Iterator[Contribution]:
        """The accepted contributions, one by one, in the order of the rows."""
        return map(self._contribution, self._attendance.in_order())

    def __getitem__(self, client_id: Hashable) -> Contribution:
        """The accepted contribution of one client."""
        with self._attendance.lock:
            return self._contribution(self._attendance.accepted[client_id])

    def __repr__(self) -> str:
        return (
            f"UpdateStore(num_params={self.num_params}, capacity={self.capacity}, dtype={self.dtype}): "
            f"{len(self)} clients, {len(self.rejected)} rejected"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a store is not copied: make a second one and put into it what iterating over this one gives, or open its "
            "file; other processes fill rows through writer()"
        )

    @property
    def aggregated(self) -> bool:
        """Whether the round has ended, so that the next contribution begins another one."""
        return self._attendance.ended

    @property
    def rejected(self) -> dict[Hashable, str]:
        """Reason by client id of those that were not accepted."""
        return self._attendance.rejected

    @property
    def num_params(self) -> int:
        """``P``."""
        return self._rows.shape.num_params

    @property
    def capacity(self) -> int:
        """Largest number of accepted clients."""
        return self._rows.shape.capacity

    @property
    def tile(self) -> int:
        """``L``, the number of parameters in a tile."""
        return self._rows.shape.tile

    @property
    def with_fishers(self) -> bool:
        """Whether the store holds Fishers."""
        return self._rows.shape.with_fishers

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which updates and Fishers are kept."""
        return self._rows.shape.dtype

    @property
    def device(self) -> torch.device:
        """Device on which updates and Fishers are kept."""
        return self._rows.device

    @property
    def nbytes(self) -> int:
        """Memory, or file, of updates and Fishers at full capacity."""
        return self._rows.shape.nbytes

    @property
    def clients(self) -> tuple[Hashable, ...]:
        """Ids of the accepted clients: the rows of everything else."""
        return tuple(client.client for client in self._attendance.in_order())

    @property
    def updates(self) -> Tensor:
        """Tiled client matrix ``[T, K, L]`` of the accepted clients' updates; a view, of a store in one memory only."""
        return self._matrices().updates

    @property
    def fishers(self) -> Tensor | None:
        """Tiled client matrix ``[T, K, L]`` of their Fishers, a view as well; None in a store without Fishers."""
        return self._matrices().fishers

    @property
    def num_samples(self) -> Tensor:
        """Sample counts of the accepted clients, float64 ``[K]``."""
        return self.client_updates().num_samples

    def clear(self) -> None:
        """Forget everything for the next round; memory and file are kept."""
        self._attendance.clear()

    def end_round(self, clients: Iterable[Hashable]) -> None:
        """Let the next contribution begin another round, as ``AggregationRule.aggregate`` does when it is done.

        Args:
            clients: Who took part. What others put meanwhile belongs to the next round.
        """
        self._attendance.end(clients)

    def close(self) -> None:
        """Let go of the file, which others can then write; a store in memory needs no closing."""
        with self._attendance.lock:
            self._attendance.settle()
            self._rows.close()

    def reject(self, client_id: Hashable, reason: str) -> None:
        """Record that a client has no usable contribution this round, such as one that sent nothing."""
        self._attendance.reject(plain_id(client_id), reason)

    def remove(self, client_id: Hashable) -> None:
        """Take back an accepted contribution; its client may send another one.

        Raises:
            KeyError: no such client is accepted.
        """
        self._attendance.remove(client_id)

    def put(
        self,
        update: Any,
        fisher: Any,
        num_samples: float | Tensor,
        client_id: Hashable | None = None,
        *,
        row: int | None = None,
        replace: bool = False,
        base: Tensor | None = None,
    ) -> bool:
        """Copy one client's contribution into the store, if it can be used.

        Args:
            update: ``delta_k = w_k - w [P]`` in floating point, of any strides: a tensor, a NumPy array, an object with
                ``__dlpack__``, a mapping by parameter name (of a store with a layout), or a buffer of ``P`` numbers.
            fisher: ``F_k [P]`` in any form that the update may have; None for a store without Fishers.
            num_samples: ``n_k``.
            client_id: A string, an integer, or anything else that has a hash and tells it from others; by default the
                number of earlier calls in this round, or the next one that is no client's.
            row: Row in which it lies, so that the order of the rows does not depend on who arrives first; by default
                the first free row.
            replace: Whether a contribution under an accepted id takes the place of the first one, which stays until the
                new one is accepted; that takes a free row. By default it is not accepted.
            base: ``w [P]``, float32 or float64, where ``update`` is the client's state ``w_k`` instead: the difference
                is formed in the dtype of ``w`` while it is copied. A store without copies keeps it, too.

        Returns:
            Whether it was accepted; if not, ``rejected`` tells why.

        Raises:
            RuntimeError: the store is full.
            TypeError: ``client_id``, ``row`` or ``base`` is of another type than it can be.
            ValueError: it was not accepted, and ``on_invalid`` is ``"raise"``; the given row is not free; or ``base``
                does not fit the store.
        """
        if client_id is not None:
            client_id = plain_id(client_id)
        if row is not None:
            check_integer("row", row)
        base = self._writer.checked_base(base)
        arrival = self._attendance.enter(client_id, row, replace)
        if arrival is None:
            return False
        try:
            self._note_unused(fisher)
            accepted = self._writer.fill(arrival.row, arrival.client, update, fisher, num_samples, base)
            self._rows.commit(accepted)
        except ValueError as error:
            self._attendance.leave(arrival, str(error))
            return False
        except BaseException:
            self._attendance.leave(arrival)
            raise
        self._attendance.accept(accepted)
        return True

    def writer(self) -> RowWriter:
        """What fills rows of a shared store in another process, to which it goes when that is started.

        There ``accepted = writer.fill(row, client_id, update, fisher, num_samples)`` raises ValueError with the reason
        why a client cannot be accepted; here :meth:`admit` or :meth:`reject` then says so. Who fills which row, and
        that nobody reads the store meanwhile, is up to the caller.
        """
        return self._writer

    def admit(self, accepted: Accepted) -> None:
        """Accept a client whose row another process has filled.

        Raises:
            ValueError: it is accepted already, or its row is not free.
        """
        self._attendance.admit(accepted)

    def client_updates(self) -> ClientUpdates:
        """The round so far, as rules see it; waits for contributions that are being copied."""
        return self._attendance.client_updates()

    def _note_unused(self, fisher: Any) -> None:
        if fisher is not None and not self.with_fishers and not self._warned:
            self._warned = True
            warnings.warn(
                "the store keeps no Fishers (with_fishers=False): those given are ignored", stacklevel=callers_level()
            )

    def _contribution(self, client: Accepted) -> Contribution:
        row = self._rows.read(client.row)
        return Contribution(client.client, row[UPDATE], row[FISHER] if self.with_fishers else None, client.num_samples)

    def _matrices(self) -> MatrixTiles:
        tiles = self.client_updates().tiles
        if not isinstance(tiles, MatrixTiles):
            raise ValueError("of a store in a file, without copies or for another device, see client_updates().spans()")
        return tiles
