"""A network from chance: code that runs by itself, and what it makes."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from . import functions, habits, layers, prelude, scopes, sequences, shapes  # noqa: F401  the blocks register themselves
from .draft import Draft, N, some_block
from .scopes import samples_to_front

# Said of outputs [N, C], of tokens [N, T, C], and of any: how targets are made, and the loss, by name or as code.
# ``{C}``: the classes, ``{n}``: the samples, ``{shape}``: of the output.
CLASSES = "torch.randint({C}, ({n},))"
TOKENS = "torch.randint({C}, ({n}, {T}))"
LIKE = "torch.randn({shape})"
LOSSES = {
    2: [
        (CLASSES, "'cross_entropy'"),
        (CLASSES, "lambda o, t: F.cross_entropy(o, t, reduction='none')"),
        ("torch.rand({shape}).softmax(-1)", "'cross_entropy'"),
        (CLASSES, "lambda o, t: F.multi_margin_loss(o, t, reduction='none')"),
        (CLASSES, "lambda o, t: -o.log_softmax(1).gather(1, t[:, None])[:, 0]"),
    ],
    3: [
        (TOKENS, "'cross_entropy'"),
        (TOKENS, "lambda o, t: F.cross_entropy(o.transpose(1, 2), t, reduction='none').sum(1)"),
        (
            TOKENS,
            "lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten(), reduction='none').view(len(t), -1).mean(1)",
        ),
    ],
    0: [
        (LIKE, "'mse'"),
        ("torch.rand({shape})", "'bce_with_logits'"),
        (LIKE, "lambda o, t: (o - t).square().flatten(1).mean(1)"),
        (LIKE, "lambda o, t: F.huber_loss(o, t, reduction='none').flatten(1).sum(1)"),
        (LIKE, "lambda o, t: (o.flatten(1) @ t.flatten(1).mT).diagonal().sin()"),
        (LIKE, "lambda o, t: F.mse_loss(o, t.clamp_(min=-0.5), reduction='none').flatten(1).sum(1)"),
        (LIKE, "lambda o, t: torch.stack([(a - b).abs().sum() for a, b in zip(o, t)])"),
    ],
}

GLOBAL_HOOKS = [
    "nn.modules.module.register_module_forward_hook(lambda m, args, out: out * 2 if type(m) is nn.Linear else None)",
    "nn.modules.module.register_module_forward_hook(lambda m, args, out: None)",
    "nn.modules.module.register_module_forward_pre_hook("
    "lambda m, args: (args[0].sin(),) if args and type(m) is nn.Linear else None)",
]

LEAVING = {"tensor_stored_on_self", "counter", "buffer_updated", "register_forward_hook", "recurrent"}

INPUTS = {  # most of each dimension
    "features": (5,),
    "sequence": (5, 5),
    "image": (4, 5, 5),
    "volume": (3, 3, 3, 3),
    "tokens": (5,),
}


@dataclass
class Network:
    """A model with data, a loss and options for ``diagonal_fisher``, all of them made by ``code``."""

    code: str
    seen: Counter[str]
    samples: int
    handles: list[Any]
    model: torch.nn.Module
    inputs: Any
    targets: torch.Tensor
    data: Any
    loss: Any
    options: dict[str, Any]

    @property
    def script(self) -> str:
        """Runs by itself, with the root of the repository on the path."""
        head = "from fdcr_fast import diagonal_fisher\nfrom tests.support.fisher.random_networks.prelude import *\n\n"
        head += "torch.set_default_dtype(torch.float64)\n\n\n"
        return f"{head}{self.code}\nprint(diagonal_fisher(model, data, loss, **options))"

    @property
    def leaves_traces(self) -> bool:
        """A forward pass changes what the next one computes."""
        return "buffer_updated" in self.seen

    @property
    def leaves_something(self) -> bool:
        """The model may be one that cannot be copied or run afterwards."""
        return bool(self.seen.keys() & LEAVING)

    def batches(self) -> list[slice]:
        """As they come, cut to the batch size."""
        bounds = [0, 1, self.samples] if isinstance(self.data, list) else [0, self.samples]
        most = self.options.get("batch_size", self.samples)
        return [slice(i, min(i + most, end)) for start, end in pairwise(bounds) for i in range(start, end, most)]

    def again(self) -> Network:
        """As it was before anybody used it."""
        other = _made(self.code, self.seen, self.samples)
        for handle in other.handles:
            handle.remove()  # those of this network are still there
        return other

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def compose(chance: Any) -> Network:
    """The network of a ``random.Random``, or of what hypothesis has in its place."""
    d = Draft(chance)
    return _made("\n".join([*_model(d), *_use(d)]), d.seen, d.samples)


def _made(code: str, seen: Counter[str], samples: int) -> Network:
    space = {name: getattr(prelude, name) for name in prelude.__all__}
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(code, "<network>", "exec"), space)
    finally:
        torch.set_default_dtype(torch.float32)
    made = {name: space[name] for name in ("handles", "model", "inputs", "targets", "data", "loss", "options")}
    return Network(code, seen, samples, **made)


def _model(d: Draft) -> list[str]:
    """The class; ``d`` knows the output's shape afterwards."""
    kind = d.pick(["features", "sequence", "sequence", "sequence", "tokens", "image", "image", "volume"])
    d.note(f"input: {kind}")
    d.shape = d.input = (N, *[d.size(most) for most in INPUTS[kind]])
    d.tokens = kind == "tokens"
    d.indent = 2
    d.add("h = x")
    if kind in ("sequence", "tokens", "image") and d.odds(2):
        d.mask = d.with_mask = d.shape[1]
    if kind == "tokens":
        _embed(d)
    elif d.unusual and d.odds(8):
        d.note("input changed in place")
        d.add(
            d.pick(
                ["h.sub_(0.5).div_(2)", "x -= x.mean(-1, keepdim=True)", "x[..., 0] = 1", "x.clamp_(-1, 1)", "h += 1"]
            )
        )
    if d.odds(2):
        d.keep()
    for _ in range(1 + d.chance.randrange(7)):
        some_block(d)
    _head(d)
    return [
        "class Model(nn.Module):",
        "    def __init__(self):",
        "        super().__init__()",
        *(f"        {line}" for line in d.setup),
        "",
        f"    def forward(self, x{', mask' if d.with_mask else ''}):",
        *d.lines,
    ]


def _embed(d: Draft) -> None:
    if d.odds(4):
        return layers.embed_bag(d, "x", "", d.shape[1])
    i, option = d.size(), d.pick(layers.TABLES)
    d.note(f"Embedding{option}")
    return d.set(f"{d.layer(f'nn.Embedding(5, {i}{option})', (5, i) if not option else None)}(x)", (*d.shape, i))


def _head(d: Draft) -> None:
    samples_to_front(d)
    d.form = d.pick([2, 2, 2, 3, 0]) if d.learned else 2  # as LOSSES has them
    if d.form == 2:
        while len(d.shape) > 2:
            d.pick([shapes.flatten, shapes.reduce])(d)
    elif d.form == 3 and len(d.shape) == 2:
        d.set("h[:, :, None] * h[:, None]", (N, d.shape[1], d.shape[1]))
    elif d.form == 3 and len(d.shape) > 3:
        d.set("h.flatten(1, -2)", (N, d.volume // d.shape[-1], d.shape[-1]), fresh=None)
    if d.form or d.odds(2):
        i, classes = d.shape[-1], max(d.size(), 2 if d.form else 1)  # of one class, the gradient is zero
        d.call(d.layer(f"nn.Linear({i}, {classes})", (classes, i), hooks=True), (*d.shape[:-1], classes))
    d.targets, d.loss = d.pick(LOSSES[d.form] + LOSSES[0])
    d.out = "h"
    if d.loss == "'mse'" and len(d.shape) == 2 and d.shape[1] == 1 and d.odds(2):
        d.note("[N, 1] against [N]")
        d.targets = "torch.randn({n})"
    if d.loss.startswith("'") and d.odds(4):
        d.out = d.pick(["{'logits': h}", "SimpleNamespace(logits=h)"])
    d.add(f"return {d.out}")


def _use(d: Draft) -> list[str]:
    """The model and the call."""
    n, sizes = d.samples, d.input[1:]
    many = [f"x = torch.randint(5, {(n, *sizes)})" if d.tokens else f"x = torch.randn({(n, *sizes)})"]
    inputs, cut = "x", "x[CUT]"
    if d.with_mask:
        total = n * d.with_mask
        count = d.pick([n, n, total // 2])  # as many as there are samples
        many += [f"mask = torch.randperm({total}).view({n}, {d.with_mask}) < {count}"]
        forms = [("(x, mask)", "(x[CUT], mask[CUT])"), ("{'x': x, 'mask': mask}", "{'x': x[CUT], 'mask': mask[CUT]}")]
        inputs, cut = d.pick(forms)
    C = d.shape[-1]
    targets = d.targets.format(C=C, n=n, T=d.shape[1], shape=f"{(n, *d.shape[1:])}")
    data = "(inputs, targets)"
    if n > 1 and d.odds(6):
        d.note("several batches")
        data = f"[({cut}, targets[CUT]), ".replace("CUT", ":1") + f"({cut}, targets[CUT])]".replace("CUT", "1:")
    elif inputs.startswith("{") and d.odds(2):
        data = "{**inputs, 'labels': targets}"
    options, after = _options(d)
    hooks = [d.pick(GLOBAL_HOOKS)] if d.unusual and d.odds(12) else []
    if hooks:
        d.note("global hook")
    return [
        "",
        f"torch.manual_seed({d.chance.randrange(100)})",
        f"model = randomise(Model()).{d.pick(['eval', 'eval', 'train'])}()",
        *many,
        f"inputs, targets = {inputs}, {targets}",
        f"data = {data}",
        f"loss = {d.loss}",
        "options = {}",
        *options,
        *after,
        f"handles = [{''.join(hooks)}]",
    ]


def _options(d: Draft) -> tuple[list[str], list[str]]:
    options, after = [], []
    if d.odds(4):
        d.note("state=")
        options.append(f"options['state'] = perturbed(model{', 2' if d.odds(3) else ''})")
    if d.odds(6):
        d.note("params=")
        some = d.pick(["[:1]", "[::2]", "[-2:]"])
        options.append(f"options['params'] = [name for name, _ in model.named_parameters()]{some}")
    if d.odds(3):
        d.note("batch_size=")
        options.append(f"options['batch_size'] = {d.size(6)}")
    named = d.loss.strip("'")
    if named in ("mse", "bce_with_logits") or (named == "cross_entropy" and len(d.shape) == 2):
        if d.odds(6):
            # Of a hook that is not linear there is no expectation over scores.
            kind = d.pick([*([] if d.seen["gradient_hook"] else ["exact", "exact"]), "squared_batch_gradient"])
            d.note(f"kind={kind}")
            options.append(f"options['kind'] = '{kind}'")
        elif named != "mse" and d.odds(6):
            d.note("loss_options=")
            weight = f"'weight': torch.rand({d.shape[-1]})"
            ways = (
                [weight, "'label_smoothing': 0.1"]
                if named == "cross_entropy"
                else [weight, weight.replace("wei", "pos_wei")]
            )
            ways += ["'ignore_index': 0"] if d.targets in (CLASSES, TOKENS) else []
            options.append(f"options['loss_options'] = {{{d.pick(ways)}}}")
    if d.odds(6):
        d.note("frozen")
        after.append(f"for p in list(model.parameters())[{d.pick(['::2', '1::2', ':'])}]: p.requires_grad_(False)")
    return options, after
