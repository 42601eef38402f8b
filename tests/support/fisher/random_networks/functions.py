"""Blocks that compute element by element, out of place and in place."""

from __future__ import annotations

from .draft import Draft, N, always, block, features, rows, samples_first, wide

# True: the backward pass does not need the result, which may then be changed in place.
POINTWISE = {
    "torch.relu(h)": False,
    "torch.tanh(h)": False,
    "F.gelu(h)": True,
    "F.silu(h)": True,
    "torch.sigmoid(h)": False,
    "F.softplus(h)": True,
    "F.leaky_relu(h, 0.2)": True,
    "F.elu(h)": False,
    "torch.sin(h)": True,
    "h.abs()": True,
    "h.clamp(-1, 1)": True,
    "-h": True,
    "h * h": True,
    "h.square() * 0.1": True,
    "(-h * h).exp()": False,
    "h / (1 + h.abs())": True,
    "torch.where(h > 0, h, 0.1 * h)": True,
    "torch.where(h.detach() > 0, h.sin(), h.cos())": True,
    "h.masked_fill(h > 0.9, 1)": True,
    "h + (h.sin() - h).detach()": True,
    "h * (h.detach() > 0)": True,
    "torch.logaddexp(h, -h)": True,
    "torch.atan2(h, 1 + h * h)": True,
    "torch.lerp(h, h.sin(), 0.3)": True,
    "F.dropout(h, 0.5, self.training)": None,
    "Doubled.apply(h)": True,
    "Reversed.apply(h)": True,
    "RootOfSquares.apply(h)[0]": False,
    "h + h.detach()": True,
    "h.detach().exp().clamp(max=3) * h": True,
    "h.clone()": True,
    "h.to(torch.float64)": None,
    "h.contiguous()": None,
}

# Said of a tensor that may be changed in place. What they leave is as good for the next of them, but for a few.
IN_PLACE = {
    "h.relu_()": False,
    "F.relu(h, inplace=True)": False,
    "F.relu_(h)": False,
    "F.leaky_relu(h, 0.1, inplace=True)": False,
    "F.silu(h, inplace=True)": True,
    "F.elu(h, inplace=True)": False,
    "F.hardtanh(h, inplace=True)": False,
    "F.dropout(h, 0.5, self.training, inplace=True)": True,
    "h.tanh_()": False,
    "h.sigmoid_()": False,
    "h.sin_()": True,
    "h.clamp_(-1, 1)": True,
    "h.clamp_min_(0)": True,
    "h.mul_(0.5)": True,
    "h.add_(1)": True,
    "h.sub_(0.3).div_(0.7)": True,
    "h.neg_()": True,
    "h.abs_()": True,
    "h.masked_fill_(h > 0.9, 0.5)": True,
    "h.add_(h.clone().sin(), alpha=0.5)": True,
    "h.copy_(h.flip(-1) * 2)": True,
    "TripledInPlace.apply(h)": False,
}

ALONG_AN_AXIS = {
    "h.softmax({0})": False,
    "F.log_softmax(h, {0})": False,
    "h.cumsum({0})": True,
    "h.sigmoid().cumprod({0})": False,
    "h.logcumsumexp({0})": False,
    "h.cummax({0}).values": True,
    "h.flip({0})": True,
    "h.roll(1, {0})": True,
    "h.sort({0}).values": True,
    "h.sort({0}, descending=True)[0]": True,
    "h.gather({0}, h.argsort({0}, descending=True))": True,
    "torch.take_along_dim(h, h.argsort({0}), {0})": True,
    "h.scatter({0}, h.argmax({0}, keepdim=True), 0.5)": True,
    "h - h.mean({0}, keepdim=True)": True,
    "h - h.amax({0}, keepdim=True).detach()": True,
    "F.normalize(h, dim={0})": True,
    "h / (h.norm(dim={0}, keepdim=True) + 0.1)": True,
    "torch.fft.fft(h.contiguous(), dim={0}).real": True,
}

STATEMENTS = [
    "h += 1",
    "h *= 2",
    "h -= 0.5 * h.detach()",
    "h /= 3",
    "h[...] = h.clone().cos()",
    "h[h > 0.9] = 0.5",
    "h[h < 0] *= 0.1",
]

JOINS = ["h + {0}", "h * {0}", "h - {0}.detach()", "torch.where({0} > 0, h, {0})", "torch.maximum(h, {0})"]
JOINS_IN_PLACE = ["h += {0}", "h.add_({0}, alpha=0.5)", "h.mul_({0}.sigmoid())", "h[...] = h + {0}"]

MODULES = ["ReLU(inplace=True)", "LeakyReLU(inplace=True)", "Hardswish(inplace=True)", "ELU(inplace=True)"]
MODULES += ["ReLU()", "Tanh()", "GELU()", "Softplus()", "Dropout(0.5)", "Dropout(0.5, inplace=True)", "Identity()"]


@block(always, weight=4)
def pointwise(d: Draft) -> None:
    code = d.pick(list(POINTWISE))
    d.set(code, fresh=POINTWISE[code])


@block(always, weight=3)
def in_place(d: Draft) -> None:
    d.own()
    if d.odds(3):
        d.add(d.pick(STATEMENTS))
        return
    code = d.pick(list(IN_PLACE))
    d.add(code if "TripledInPlace" not in code and d.odds(2) else f"h = {code}")
    d.fresh = IN_PLACE[code]


@block(always, weight=2)
def activation_module(d: Draft) -> None:
    code = d.pick(MODULES)
    if "inplace" in code:
        d.own()
    learned, aliased = d.learned, d.aliased and "inplace" in code
    d.set(f"{d.layer('nn.' + code)}(h)", fresh=code in ("GELU()", "Softplus()", "Hardswish(inplace=True)"))
    d.learned, d.aliased = learned, aliased


@block(always, weight=3)
def in_place_slice(d: Draft) -> None:
    axis = d.axis()
    if axis is None:
        return
    d.own()
    size = d.shape[axis]
    first, last, tail = d.at(axis, "0"), d.at(axis, "-1"), d.at(axis, "1:")
    ways = [f"{first} = 0.5", f"{first} *= 2", f"{first}.relu_()", f"{last} += 1", f"{first} = {last}.clone().sin()"]
    ways += [f"h.select({axis}, 0).mul_(3)", f"h.narrow({axis}, 0, 1).tanh_()", f"h.select({axis}, {size - 1}).zero_()"]
    ways += [f"{d.at(axis, '::2')} = -{d.at(axis, '::2')}", f"h.index_fill_({axis}, torch.tensor([0]), 0.1)"]
    ways += [f"{tail} = {tail} + {d.at(axis, ':-1')}", f"{tail}.sub_({d.at(axis, ':-1')}.clone())"]
    ways += [f"h.index_add_({axis}, torch.tensor([0]), {d.at(axis, '-1:')}.clone().sin())"]
    ways += [f"h.index_copy_({axis}, torch.tensor([0]), {d.at(axis, '-1:')}.clone().sin())"]
    way = d.pick(ways)
    d.add(way)
    d.fresh = not any(word in way for word in ("relu_", "tanh_"))


@block(always)
def in_place_view(d: Draft) -> None:
    """What is changed is a view of ``h``; ``h`` changes with it."""
    d.own()
    view = d.pick(["h.view(-1)", "h.unsqueeze(0)", "h.movedim(-1, 0)", "h.unsqueeze(-1)", "h.detach()"])
    if "view(" in view:
        d.set("h.contiguous()", fresh=None)
        d.own()
    d.add(f"{view}.{d.pick(['mul_(2)', 'add_(1)', 'clamp_(min=-1)'])}")


@block(samples_first(2, 3, 4))
def fill_a_new_tensor(d: Draft) -> None:
    sizes = ", ".join(map(str, d.shape[1:]))
    make = d.pick(["h.new_zeros(len(h), {0})", "torch.zeros(len(h), {0}, dtype=h.dtype)", "torch.empty_like(h)"])
    d.add(f"out = {make.format(sizes)}")
    ways = ["out.copy_(h)", "out[...] = h", "out[:] = h * 2"]
    if "empty" not in make:
        ways += (
            ["out += h", "out.scatter_(-1, h.argsort(-1), h)", "out[..., 0] = h[..., 0]"] if len(d.shape) > 1 else []
        )
    d.add(d.pick(ways))
    d.set("out")


@block(lambda d: features(d) and wide(d))
def along_an_axis(d: Draft) -> None:
    code = d.pick(list(ALONG_AN_AXIS))
    d.set(code.format(d.axis(2)), fresh=ALONG_AN_AXIS[code])


@block(features)
def functional_norm(d: Draft) -> None:
    i = d.shape[-1]
    code = d.pick(["F.layer_norm(h, ({0},))", "F.layer_norm(h, ({0},), {1}, {2})", "F.rms_norm(h, ({0},), {1})"])
    d.set(code.format(i, *[d.parameter(i) for k in (1, 2) if f"{{{k}}}" in code]))


@block(lambda d: bool(d.kept), weight=8)
def join_with_an_earlier_tensor(d: Draft) -> None:
    join(d, *d.pick(d.kept))


def join(d: Draft, name: str, shape: tuple[int, ...]) -> None:
    """Residuals, and gates where shapes differ."""
    if shape == d.shape:
        way = d.pick([*JOINS, *JOINS_IN_PLACE])
        if way in JOINS:
            d.set(way.format(name))
        else:
            d.own()
            d.add(way.format(name))
        return
    ones = [1] * len(d.shape)
    ones[d.n] = -1
    gate = f"{name}.movedim({shape.index(N)}, 0).flatten(1).mean(1).view({', '.join(map(str, ones))})"
    d.set(d.pick(["h * {0}", "h + {0}", "torch.lerp(h, h.sin(), {0}.sigmoid())"]).format(gate))


@block(always, weight=2)
def keep_for_later(d: Draft) -> None:
    d.keep()


@block(lambda d: rows(d) and wide(d), unusual=True)
def gradient_inside(d: Draft) -> None:
    """Forces, scores: the model's output has a gradient in it."""
    d.add("live = h.requires_grad and torch.is_grad_enabled()")
    d.add("with_grad = h if live else h.detach().requires_grad_()")
    energy = d.pick(["with_grad.sin().sum()", "(with_grad.square() * h.detach().cos()).sum()"])
    d.add("with torch.enable_grad():")
    d.add(f"    force = torch.autograd.grad({energy}, with_grad, create_graph=True)[0]")
    d.set("h + force")
