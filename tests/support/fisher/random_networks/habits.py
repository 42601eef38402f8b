"""Blocks that leave something behind: buffers, tensors on the module, hooks on tensors."""

from __future__ import annotations

from .draft import Draft, N, always, block, features, rows


def once(d: Draft) -> bool:
    """What a forward pass leaves behind is another thing when it runs twice."""
    return not d.repeated


@block(once, weight=2, unusual=True)
def buffer_updated(d: Draft) -> None:
    """Used before it is updated: samples stay independent."""
    b = f"self.{d.name('b')}"
    shape = tuple(1 if size == N else size for size in d.shape)
    d.setup.append(f"self.register_buffer('{b[5:]}', torch.rand({shape}){d.pick(['', ', persistent=False'])})")
    d.set(d.pick([f"h + {b}", f"h * {b}.clone()", f"h - {b}.mean()"]))
    mean = f"h.detach().mean({d.n}, keepdim=True)"
    ways = [
        f"{b}.mul_(0.9).add_({mean}, alpha=0.1)",
        f"{b} += 1",
        f"{b} = 0.9 * {b} + 0.1 * {mean}",
        f"{b}.copy_({mean})",
    ]
    ways += [f"{b} = {b} + 1", f"{b}.zero_()", f"{b}.data.add_(1)", f"{b}[...] = {mean}"]
    with d.inside("with torch.no_grad():"):
        d.add(d.pick(ways))


@block(once, unusual=True)
def counter(d: Draft) -> None:
    kind = d.pick(["tensor", "number", "list"])
    c = f"self.{d.name('c')}"
    if kind == "tensor":
        d.setup.append(f"self.register_buffer('{c[5:]}', torch.zeros((), dtype=torch.long))")
        d.add(d.pick([f"{c} += 1", f"{c}.add_(len(h))", f"{c} = {c} + 1"]))
    elif kind == "number":
        d.setup.append(f"{c} = 0")
        d.add(f"{c} += 1")
    else:
        d.setup.append(f"{c} = []")
        d.add(f"{c} = [h]")
    d.set("h * 0.9")


@block(once, weight=2, unusual=True)
def tensor_stored_on_self(d: Draft) -> None:
    s = f"self.{d.name('s')}"
    ways = [f"{s} = h", f"{s} = h.detach()", f"{s} = {{'h': h}}", f"{s} = (h, h.mean())", f"{s} = h.sum()"]
    way = d.pick(ways)
    if d.odds(2):
        d.setup.append(f"{s} = None")
    d.add(way)
    if way == f"{s} = h":
        d.kept.append((s, d.shape))
        d.aliased = True


GRADIENTS = ["g * 2", "-g", "g * (g.new_ones(()) / 3)", "g / (1 + g.norm())", "g.clamp(-0.1, 0.1)", "g - 0.1 * g.sum()"]


@block(always, unusual=True)
def gradient_hook(d: Draft) -> None:
    d.set(d.pick(["h * 1.5", "h + 0.1"]))
    d.add("if h.requires_grad:")
    d.add(f"    h.register_hook(lambda g: {d.pick(GRADIENTS)})")


@block(features, unusual=True)
def parameter_told_from_tensors(d: Draft) -> None:
    p = d.parameter(d.shape[-1])
    d.set(f"h * {p} * (1.5 if isinstance({p}, nn.Parameter) else 1)")


@block(lambda d: rows(d) and d.depth == 0, unusual=True)
def intermediate_gradient_kept(d: Draft) -> None:
    d.set("h * 1.1", fresh=False)
    d.add("if h.requires_grad:")
    d.add("    h.retain_grad()")


@block(lambda d: bool(d.layers), unusual=True)
def another_name_for_a_layer(d: Draft) -> None:
    d.setup.append(f"self.{d.name('again')} = {d.pick(d.pick(list(d.layers.values())))}")
    d.set("h * 0.8")


@block(lambda d: d.shape[-1] != N and once(d), unusual=True)
def weight_kept_within_bounds(d: Draft) -> None:
    """By the forward pass itself."""
    i = d.shape[-1]
    p = d.parameter(i)
    if p.startswith("self.p"):
        d.add("with torch.no_grad():")
        d.add(f"    {p}.{d.pick(['clamp_(-1, 1)', 'clamp_(min=0.1)', 'data.clamp_(max=0.5)'])}")
    d.set(f"h * {p}")
