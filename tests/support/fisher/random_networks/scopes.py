"""Blocks around blocks: samples merged with positions, chosen rows, routing, checkpoints, branches without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from .draft import Draft, N, block, features, rows, sequence, some_block
from .functions import join

DEEPEST = 2


def shallow(d: Draft) -> bool:
    return d.depth < DEEPEST


def merged(d: Draft) -> bool:
    return shallow(d) and len(d.shape) > 2


@contextmanager
def scope(d: Draft, same: bool = False) -> Iterator[None]:
    """Tensors from outside are at hand if the rows are the ``same``; those from inside are not afterwards."""
    kept, mask = d.kept, d.mask
    d.kept, d.mask = (list(kept), mask) if same else ([], 0)
    d.depth += 1
    yield
    d.depth -= 1
    d.kept, d.mask = kept, mask


def body(d: Draft, most: int = 3, names: Sequence[str] | None = None) -> None:
    for _ in range(1 + d.chance.randrange(most)):
        some_block(d, names)


def sizes(shape: Sequence[int]) -> str:
    return "".join(f", {size}" for size in shape)


def samples_to_front(d: Draft) -> None:
    if d.n:
        shape = (N, *[size for size in d.shape if size != N])
        d.set(f"h.movedim({d.n}, 0)", shape, fresh=None)


@block(merged, weight=4)
def merge_samples_and_positions(d: Draft) -> None:
    """Every position of every sample becomes a row: samples first, or positions first."""
    if d.n > 1:
        samples_to_front(d)
    positions_first = d.n == 1
    T, rest = d.shape[1 - d.n], d.shape[2:]
    code = d.pick([f"h.reshape(-1{sizes(rest)})", "h.flatten(0, 1)", f"h.contiguous().view(-1{sizes(rest)})"])
    d.set(code, (N, *rest), fresh=None)
    with scope(d):
        body(d)
        samples_to_front(d)
    rest = d.shape[1:]
    split = f"{T}, -1" if positions_first else f"-1, {T}"
    d.set(f"h.reshape({split}{sizes(rest)})", (T, N, *rest) if positions_first else (N, T, *rest), fresh=None)


@block(lambda d: merged(d) and rows(d) and sequence(d))
def merge_positions_and_samples(d: Draft) -> None:
    """Samples first, but rows in the order of positions."""
    T, i = d.shape[1:]
    d.set(f"h.transpose(0, 1).reshape(-1, {i})", (N, i), fresh=None)
    with scope(d):
        body(d)
        samples_to_front(d)
    rest = d.shape[1:]
    d.set(f"h.reshape({T}, -1{sizes(rest)}).transpose(0, 1)", (N, T, *rest), fresh=None)


@block(lambda d: shallow(d) and rows(d) and len(d.shape) == 4, weight=3)
def windows(d: Draft) -> None:
    """Windows of an image with channels last, each as a sequence of its own, and back, as in Swin; maybe shifted."""
    H, W, C = d.shape[1:]
    a, b = (d.pick([k for k in range(1, size + 1) if size % k == 0]) for size in (H, W))
    shift = d.odds(3)
    if shift:
        d.set("torch.roll(h, (-1, -1), (1, 2))")
    grid = f"h.reshape(-1, {H // a}, {a}, {W // b}, {b}, {C}).permute(0, 1, 3, 2, 4, 5)"
    d.set(f"{grid}.reshape(-1, {a * b}, {C})", (N, a * b, C), fresh=None)
    with scope(d):
        body(d)
        samples_to_front(d)
    rest = d.shape[1:]
    if len(rest) == 2 and rest[0] == a * b:
        grid = f"h.reshape(-1, {H // a}, {W // b}, {a}, {b}, {rest[1]}).permute(0, 1, 3, 2, 4, 5)"
        d.set(f"{grid}.reshape(-1, {H}, {W}, {rest[1]})", (N, H, W, rest[1]), fresh=None)
        if shift:
            d.set("h.roll((1, 1), (1, 2))")
    else:
        count = H // a * (W // b)
        d.set(f"h.reshape(-1, {count}{sizes(rest)})", (N, count, *rest), fresh=None)


@block(lambda d: shallow(d) and rows(d), weight=2)
def samples_in_another_order(d: Draft) -> None:
    order = d.name("order")
    d.add(f"{order} = {d.pick(['h.detach().flatten(1).sum(1).argsort()', 'torch.arange(len(h)).flip(0)'])}")
    d.set(d.pick([f"h[{order}]", f"h.index_select(0, {order})"]))
    with scope(d):
        body(d)
        samples_to_front(d)
    way = d.pick([f"h[{order}.argsort()]", f"torch.empty_like(h).index_copy(0, {order}, h)", "out"])
    if way == "out":
        d.add("out = torch.zeros_like(h)")
        d.add(f"out[{order}] = h")
    d.set(way)


WITHOUT_ROWS_TOO = ["linear", "norm_of_features", "bare_parameter", "pointwise", "activation_module", "adapter"]


@block(lambda d: shallow(d) and rows(d), weight=4)
def chosen_rows(d: Draft) -> None:
    """Blocks for the rows that a mask chooses; what the others have instead is zero, or what they had."""
    masks = [("h.detach().flatten(1).mean(1) > 0.05", 1)]  # of what is standardised, the mean is 0 but for rounding
    if len(d.shape) > 2:
        masks += [("h.detach().flatten(2).mean(2) > 0.05", 2), ("h.detach().flatten(2)[..., 0] > 0", 2)]
        masks += [("mask", 2)] * 5 * (d.mask == d.shape[1])
    code, lead = d.pick(masks)
    d.note(f"chosen_rows by {'mask' if code == 'mask' else 'value'} of {'samples' if lead == 1 else 'positions'}")
    first, inner = d.shape[:lead], d.shape[lead:]
    whole, mask = d.name("whole"), d.name("mask")
    d.add(f"{whole}, {mask} = h, {code}")
    guard = d.odds(2)
    with d.inside(f"if {mask}.any():") if guard else nullcontext(), scope(d):
        d.set(d.pick([f"h[{mask}]", f"h[{mask}.nonzero(as_tuple=True)]"]), (N, *inner))
        body(d, 2, None if guard else WITHOUT_ROWS_TOO)
        samples_to_front(d)
        rest = d.shape[1:]
        zeros = f"{whole}.new_zeros(*{mask}.shape{sizes(rest)})"
        start = f"{whole}.clone()" if rest == inner and d.odds(2) else zeros
        at = f"{mask}.nonzero(as_tuple=True)"
        ones = ", 1" * len(rest)
        ways = [f"({start}).index_put({at}, h)", f"({start}).masked_scatter({mask}.view(*{mask}.shape{ones}), h)"]
        if d.odds(2):
            d.add(f"out = {start}")
            d.add(f"out[{mask}] = h")
            ways = ["out"]
        d.set(d.pick(ways), (*first, *rest))
    if guard:
        with d.inside("else:"):
            d.add(f"h = {start.removesuffix('.clone()')}")
        d.fresh = False


@block(lambda d: features(d) and rows(d), weight=3)
def experts(d: Draft) -> None:
    """Tokens or samples go to the expert that a router chooses."""
    i, o, count = d.shape[-1], d.size(), d.pick([2, 3])
    of_samples = len(d.shape) > 2 and d.odds(3)
    d.note(f"experts of {'samples' if of_samples else 'tokens'}")
    router = d.layer(f"nn.Linear({i}, {count})", (count, i))
    inner = d.pick(
        [f"nn.Linear({i}, {o})", f"nn.Sequential(nn.Linear({i}, 3), nn.ReLU(inplace=True), nn.Linear(3, {o}))"]
    )
    choice = d.layer(f"nn.ModuleList([{inner} for _ in range({count})])")
    d.add(f"rows = h{'' if of_samples else f'.reshape(-1, {i})'}")
    d.add(f"gates = {router}(rows{'.flatten(1, -2).mean(1)' if of_samples else ''}).softmax(-1)")
    ones = ", None" * (len(d.shape) - 1 if of_samples else 1)
    if d.odds(3):  # sorted by expert, cut, and sorted back
        d.add("gate, chosen = gates.max(-1)")
        d.add("order = chosen.argsort(stable=True)")
        d.add(f"parts = rows[order].split(chosen.bincount(minlength={count}).tolist())")
        d.add(f"out = torch.cat([expert(part) for expert, part in zip({choice}, parts)])[order.argsort()]")
        d.add(f"out = out * gate[:{ones}]")
    else:
        top = d.pick([1, 1, 2])
        d.add(f"gate, chosen = gates.topk({top}, -1)")
        d.add(f"out = rows.new_zeros(len(rows){sizes((*d.shape[1:-1], o) if of_samples else (o,))})")
        with d.inside(f"for k, expert in enumerate({choice}):"):
            d.add("where, slot = (chosen == k).nonzero(as_tuple=True)")
            if d.odds(2):
                d.add("if len(where) == 0:")
                d.add("    continue")
            result = f"expert(rows[where]) * gate[where, slot][:{ones}]"
            ways = [f"out = out.index_add(0, where, {result})", f"out.index_add_(0, where, {result})"]
            ways += [f"out[where] = {result}", f"out[where] += {result}"] if top == 1 else []
            d.add(d.pick(ways))
    d.set("out" if of_samples else f"out.view(-1{sizes((*d.shape[1:-1], o))})", (*d.shape[:-1], o))


@block(shallow, weight=3, unusual=True)
def checkpointed(d: Draft) -> None:
    """Activations that the backward pass computes again."""
    part = d.name("part")
    reentrant = d.learned and d.odds(4)
    d.note(f"checkpoint use_reentrant={reentrant}")
    kept, d.kept = d.kept, [] if reentrant else d.kept
    d.repeated += 1
    with d.inside(f"def {part}(h):"), scope(d, same=True):
        d.fresh = False
        body(d)
        d.add("return h")
    d.repeated -= 1
    d.kept = kept
    if reentrant and d.odds(2):
        d.note("function whose backward pass runs another one")
        d.set(f"ComputedAgain.apply(h, {part})", fresh=False)
    else:
        d.set(f"checkpoint({part}, h, use_reentrant={reentrant})", fresh=d.fresh and not reentrant)


@block(shallow, unusual=True)
def branch_without_gradient(d: Draft) -> None:
    whole = d.name("whole")
    d.add(f"{whole} = h")
    before = d.shape
    with d.inside("with torch.no_grad():"), scope(d, same=True):
        d.fresh = False
        body(d, 2)
    d.fresh = False
    join(d, whole, before)


@block(shallow)
def loop(d: Draft) -> None:
    """The same blocks twice, where the shape allows it."""
    before, lines = d.shape, d.lines
    d.lines = []
    d.indent += 1
    d.repeated += 1
    with scope(d, same=True):
        d.fresh = False
        body(d)
    inside, d.lines = d.lines, lines
    d.repeated -= 1
    d.indent -= 1
    d.add(f"for _ in range({2 if d.shape == before else 1}):")
    d.lines += inside or ["    " * (d.indent + 1) + "pass"]
