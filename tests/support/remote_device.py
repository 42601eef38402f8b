"""A device for tests on machines without one: its tensors are computed on the CPU, but behave as on a GPU.

Operations refuse to mix them with tensors of the CPU, as CUDA does, and everything for which a host would have to wait
for the device is counted: copies to the CPU, copies to the device that do not say ``non_blocking``, numbers and truth
values, and operations whose result has a shape that depends on values.
"""

import traceback
from contextlib import contextmanager

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten


class Stream:
    """A stream by what it knows to be done: of every stream, how many operations."""

    def __init__(self, device=None):
        self.done = {self: 0}
        self.synchronized = 0

    def wait_stream(self, other):
        self.done = {s: max(self.done.get(s, 0), other.done.get(s, 0)) for s in {*self.done, *other.done}}

    def synchronize(self):
        self.synchronized += 1


class Streams(backend_registration._DummyBackendModule):
    """What ``torch.cuda`` offers of streams, and whether operations of one overtake those of another."""

    Stream = Stream

    def __init__(self):
        self.forget()

    def forget(self):
        self.current, self.written, self.read = [Stream()], {}, {}

    def current_stream(self, device=None):
        return self.current[-1]

    @contextmanager
    def stream(self, stream):
        self.current.append(stream)
        yield
        self.current.pop()

    def run(self, func, reads, writes, new):
        """Note an operation on storages, and refuse it where the stream does not know that those before it are done."""
        stream = self.current[-1]
        stream.done[stream] += 1
        before = [self.written[x] for x in (*reads, *writes) if x in self.written]
        before += [(s, i) for x in writes for s, i in self.read.get(x, {}).items()]
        if any(stream.done.get(s, 0) < i for s, i in before):
            raise RuntimeError(f"{func} overtakes another stream")
        for x in (*writes, *new):
            self.written[x] = stream, stream.done[stream]
            self.read[x] = {}
        for x in reads:
            self.read.setdefault(x, {})[stream] = stream.done[stream]


streams = Streams()
backend_registration._setup_privateuseone_for_python_backend("remote", backend_module=streams)
DEVICE = torch.device("remote", 0)
OF_VALUES = {
    aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero, aten.masked_select, aten._unique2,
    aten.bincount, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten._linalg_eigh,
}  # fmt: skip
BESIDE_CPU = {"gram", "central_mean", "fill_row", "moments"}  # operators that take some of their arguments on the CPU


class Remote(torch.Tensor):
    @staticmethod
    def __new__(cls, local):
        return torch.Tensor._make_wrapper_subclass(
            cls, local.shape, local.stride(), local.storage_offset(), dtype=local.dtype, device=DEVICE
        )

    def __init__(self, local):
        self.local = local

    def record_stream(self, stream):
        pass

    @property
    def place(self):
        return self.local.untyped_storage().data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("a tensor outlived its device")


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on and moved to ``DEVICE``; ``waits`` holds where the host waited."""

    def __init__(self):
        super().__init__()
        self.waits = []
        streams.forget()

    def wait(self, func):
        frames = [f for f in traceback.extract_stack() if "fdcr_fast" in f.filename]
        self.waits.append(f"{func} at " + " < ".join(f"{f.filename[-20:]}:{f.lineno}" for f in frames[:-4:-1]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        remote = [x for x in flat if isinstance(x, Remote)]
        local = [x for x in flat if not isinstance(x, Remote) and x.dim() > 0]
        packet, to = func._overloadpacket, kwargs.get("device")
        there = bool(remote) if to is None else to.type == DEVICE.type
        if packet in (aten._to_copy, aten.copy_):
            source = args[1] if packet is aten.copy_ else args[0]
            there = isinstance(args[0], Remote) if packet is aten.copy_ else there
            if isinstance(source, Remote) != there:
                blocking = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
                assert there or blocking, "a copy to the CPU is read before it is there"
                if blocking and source.numel():
                    self.wait(func)
        elif remote:
            indexed = packet in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_)
            masks = indexed and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
            told = kwargs.get("output_size") is not None
            if (packet in OF_VALUES and not told) or masks or (indexed and local):
                self.wait(func)
            ours = func.namespace == "fdcr_fast" and packet.__name__ in BESIDE_CPU
            if packet.__name__ == "fill_row" and ours:
                there = isinstance(args[2], Remote)
                if not there:
                    self.wait(func)
            if local and not indexed and not ours:
                raise RuntimeError(f"{func} of tensors on {DEVICE} and on the CPU")
            there = there and packet not in (aten._local_scalar_dense, aten.equal)
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        given = {id(x.local): x for x in remote}
        seen = {x.place for x in remote}
        kwargs.pop("pin_memory", None)
        result = func(
            *tree_map_only(Remote, lambda x: x.local, args), **tree_map_only(Remote, lambda x: x.local, kwargs)
        )
        if there:
            result = tree_map_only(torch.Tensor, lambda x: given[id(x)] if id(x) in given else Remote(x), result)
        if not func.is_view:
            flat = zip(func._schema.arguments, args, strict=False)
            written = [x for a, x in flat if a.alias_info and a.alias_info.is_write and isinstance(x, Remote)]
            new = {x.place for x in tree_flatten(result)[0] if isinstance(x, Remote)} - seen
            written = {x.place for x in written}
            streams.run(func, seen - written, written, new)
        return result
