"""The code of a network while it is being composed, line by line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

N = 0  # the samples, in a shape
ROOM = 64  # numbers of one sample in one tensor, at most

PARAMETRISATIONS = [
    "parametrizations.weight_norm({0})",
    "parametrizations.spectral_norm({0})",
    "parametrize.register_parametrization({0}, 'weight', ScaledWeight())",
    "old_weight_norm({0})",
    "old_spectral_norm({0})",
    "parametrizations.orthogonal({0}, orthogonal_map='cayley')",
]

HOOKS = [
    "{0}.register_forward_hook(lambda m, args, out: out * 2)",
    "{0}.register_forward_hook(lambda m, args, out: out.mul_(0.5))",
    "{0}.register_forward_hook(lambda m, args, out: out.relu_())",
    "{0}.register_forward_hook(lambda m, args, out: setattr(m, 'seen', out))",
    "{0}.register_forward_pre_hook(lambda m, args: (torch.sin(args[0]),))",
    "{0}.register_full_backward_hook(lambda m, gi, go: tuple(g if g is None else g * 2 for g in gi))",
    "{0}.register_full_backward_pre_hook(lambda m, go: tuple(g if g is None else g * 3 for g in go))",
    "{0}.forward = types.MethodType(lambda m, input: type(m).forward(m, input * 2), {0})",
    "{0}.forward = types.MethodType(lambda m, input: type(m).forward(m, input).relu_(), {0})",
    "{0}.forward = types.MethodType(lambda m, input: type(m).forward(m, input) * 2, {0})",
    "{0}.again = nn.Identity()",
]

STYLES = ["discarded", "no_grad", "keyword", "forward", "functional_call", "detached twin"]
PIECES = {
    "sample by sample": "torch.cat([{0}(row) for row in h.split(1)])",
    "in pieces": "torch.cat([{0}(part) for part in h.chunk(2)])",
    "row by row": "torch.stack([{0}(row[None])[0] for row in h])",
    "without the samples": "torch.stack([{0}(row) for row in h])",
}


class Draft:
    """Lines of ``__init__`` and of ``forward``, and what is known about ``h``, the tensor that flows through.

    ``chance`` is a ``random.Random`` or what hypothesis has in its place. Only ``randrange`` is asked, and 0 is the
    plainest answer, so that failures shrink.
    """

    def __init__(self, chance: Any) -> None:
        self.chance = chance
        self.samples = (2, 3, 4, 1, 5, 6)[chance.randrange(6)]
        self.setup: list[str] = []
        self.lines: list[str] = []
        self.indent = 0
        # Half of the networks keep to what most networks are made of: there, faults do not hide behind other faults.
        self.unusual = bool(chance.randrange(2))
        self.shape: tuple[int, ...] = ()
        self.fresh = (
            self.unusual
        )  # no backward pass needs h, which may be changed in place: at first, that is the input
        self.aliased = True  # h has another name, too
        self.learned = False  # h depends on parameters
        self.mask = self.with_mask = 0  # positions of the input mask, here and at the input
        self.kept: list[tuple[str, tuple[int, ...]]] = []  # earlier tensors
        self.layers: dict[str, list[str]] = {}  # by their code,
        self.kinds: dict[str, str] = {}  # and their code
        self.weights: dict[tuple[int, ...], list[str]] = {}
        self.hooked: set[str] = set()
        self.calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []  # layers, and shapes before and after them
        self.sealed: set[str] = set()  # layers whose outputs may not be changed in place
        self.depth = 0  # of blocks around this one
        self.repeated = 0  # of loops and checkpoints around this one
        self.names: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()

    # Chance

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.chance.randrange(len(options))] if len(options) > 1 else options[0]

    def odds(self, against: int) -> bool:
        return self.chance.randrange(against) == against - 1

    def size(self, most: int = 5) -> int:
        """Of a dimension: often as many as there are samples."""
        return min(most, self.pick([2, 3, 1, 4, 5, self.samples, self.samples, self.samples]))

    def axis(self, least: int = 1) -> int | None:
        """One that is not of the samples, of ``least`` entries."""
        found = [i for i, size in enumerate(self.shape) if size >= least and size != N]
        return self.pick(found) if found else None

    # Shapes

    @property
    def n(self) -> int:
        return self.shape.index(N)

    @property
    def volume(self) -> int:
        return math.prod(size for size in self.shape if size != N)

    def room(self, factor: float) -> bool:
        return self.volume * factor <= ROOM

    def with_axis(self, axis: int, *sizes: int) -> tuple[int, ...]:
        axis %= len(self.shape)
        return (*self.shape[:axis], *sizes, *self.shape[axis + 1 :])

    def at(self, axis: int, code: str) -> str:
        return "h[" + ":, " * axis + code + "]"

    def broadcast(self) -> tuple[int, ...]:
        """A shape that broadcasts to that of ``h``, without samples."""
        shape = tuple(1 if size == N or self.odds(3) else size for size in self.shape)
        while shape and shape[0] == 1 and self.odds(2):
            shape = shape[1:]
        return shape

    # Code

    def note(self, what: str) -> None:
        self.seen[what] += 1

    def name(self, prefix: str) -> str:
        self.names[prefix] += 1
        return f"{prefix}{self.names[prefix] - 1}"

    def add(self, line: str) -> None:
        self.lines.append("    " * self.indent + line)

    @contextmanager
    def inside(self, head: str) -> Iterator[None]:
        self.add(head)
        start = len(self.lines)
        self.indent += 1
        yield
        if len(self.lines) == start:
            self.add("pass")
        self.indent -= 1

    def set(self, code: str, shape: Sequence[int] | None = None, fresh: bool | None = True) -> None:
        """``h`` becomes the value of ``code``; ``fresh=None`` for a view, which is as fresh as what it views."""
        self.add(f"h = {code}")
        self.shape = self.shape if shape is None else tuple(shape)
        if fresh is not None:
            self.fresh, self.aliased = fresh, False
        elif self.aliased and any(word in code for word in ("reshape", "flatten", "contiguous", "Flatten")):
            self.fresh = False  # a view or a copy, depending on the number of samples

    def own(self) -> None:
        """Before a change in place."""
        if not self.fresh:
            self.set("h.clone()")

    def keep(self) -> tuple[str, tuple[int, ...]]:
        name = self.name("a")
        self.add(f"{name} = h")
        self.aliased = True
        self.kept.append((name, self.shape))
        return self.kept[-1]

    def parameter(self, *shape: int) -> str:
        name = f"self.{self.name('p')}"
        same = self.weights.get(shape, []) if len(shape) > 1 else []
        self.learned = True
        if same and self.odds(8):
            self.note("parameter that is a layer's weight")
            return self.pick(same)
        if self.odds(8):
            self.setup.append(f"{name} = nn.ParameterList([nn.Parameter(torch.zeros({shape}))])")
            return f"{name}[0]"
        self.setup.append(f"{name} = nn.Parameter(torch.zeros({shape}))")
        return name

    def layer(self, code: str, weight: tuple[int, ...] | None = None, hooks: bool = False) -> str:
        """A new layer or one that is there already; ``weight`` is the shape of one that others may share."""
        self.learned |= "affine=False" not in code
        if code in self.layers and self.odds(5):
            self.note("layer called twice")
            return self.pick(self.layers[code])
        name = f"self.{self.name('l')}"
        self.setup.append(f"{name} = {code}")
        self.layers.setdefault(code, []).append(name)
        self.kinds[name] = code
        if weight is not None:
            others = self.weights.setdefault(weight, [])
            if others and self.odds(4):
                self.note("shared weight")
                self.setup.append(f"{name}.weight = {self.pick(others)}")
            elif len(weight) > 1 and self.unusual and self.odds(6):
                how = self.pick(PARAMETRISATIONS[: 6 if len(weight) == 2 else 5])
                self.note(how.partition("(")[0].removeprefix("parametrizations."))
                self.setup.append(how.format(name))
                self.hooked.add(name)
            else:
                others.append(f"{name}.weight")
        if hooks and self.unusual and self.odds(4):
            hook = self.pick(HOOKS)
            self.note(hook.split("{0}.")[1].partition(",")[0].partition("(")[0])
            self.setup.append(hook.format(name))
            self.hooked.add(name)
            if "backward" in hook or "relu_" in hook:
                self.sealed.add(name)
        return name

    def call(self, layer: str, shape: Sequence[int], fresh: bool = True) -> None:
        """``h`` goes through a layer of one input, in one of the ways in which people call layers."""
        code = f"{layer}(h)"
        self.calls.append((layer, self.shape, tuple(shape)))
        if self.unusual and self.odds(3):
            style = self.pick([*STYLES, *PIECES] if self.shape[0] == N and self.depth == 0 else STYLES)
            plain = layer not in self.hooked
            if style == "discarded" and plain:
                self.add(code)
            elif style == "no_grad" and plain:
                with self.inside("with torch.no_grad():"):
                    self.add(code)
            elif style == "keyword" and plain and "RMSNorm" not in self.kinds[layer]:
                code = f"{layer}(input=h)"
            elif style == "forward":
                code = f"{layer}.forward(h)"
            elif style == "functional_call" and any(f"{layer}.weight" in names for names in self.weights.values()):
                code = f"functional_call({layer}, {{'weight': {layer}.weight * 0.7}}, (h,))"
            elif style == "detached twin":
                code = f"{layer}(h) - 0.5 * {layer}(h.detach())"
            elif style in PIECES and not (
                style == "without the samples" and any(word in self.kinds[layer] for word in ("Norm", "PReLU"))
            ):
                code = PIECES[style].format(layer)
            else:
                style = "plainly"
            self.note(f"called {style}")
        self.set(code, shape, fresh and layer not in self.sealed)


Block = Callable[[Draft], Any]
Condition = Callable[[Draft], bool]
BLOCKS: list[tuple[Condition, Block]] = []


def block(when: Condition, weight: int = 1, unusual: bool = False) -> Callable[[Block], Block]:
    """Registers a building block for drafts of which ``when`` is true."""

    def register(build: Block) -> Block:
        condition = (lambda d: d.unusual and when(d)) if unusual else when
        BLOCKS.extend([(condition, build)] * weight)
        return build

    return register


def some_block(draft: Draft, names: Sequence[str] | None = None) -> None:
    """Appends one of the blocks that fit."""
    build = draft.pick([b for when, b in BLOCKS if when(draft) and (names is None or b.__name__ in names)])
    draft.note(build.__name__)
    build(draft)


def always(d: Draft) -> bool:
    return True


def features(d: Draft) -> bool:
    """What a layer may call features comes last."""
    return d.shape[-1] != N


def rows(d: Draft) -> bool:
    return d.shape[0] == N


def sequence(d: Draft) -> bool:
    return len(d.shape) == 3 and d.shape[-1] != N


def samples_first(*dims: int) -> Condition:
    return lambda d: d.shape[0] == N and len(d.shape) in dims


def wide(d: Draft) -> bool:
    return any(size >= 2 for size in d.shape)


def roomy(d: Draft) -> bool:
    return d.volume <= ROOM // 2
