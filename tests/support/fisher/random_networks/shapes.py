"""Blocks that move numbers: reshapes, selections, concatenations, reductions, pooling."""

from __future__ import annotations

import math

from .draft import ROOM, Draft, N, always, block, features, roomy, rows, samples_first, sequence, wide


@block(lambda d: len(d.shape) > 2, weight=3)
def permute(d: Draft) -> None:
    """Samples may end up anywhere but last."""
    order = list(range(len(d.shape)))
    i, j = d.pick(order), d.pick(order)
    order[i], order[j] = order[j], order[i]
    if d.shape[order[-1]] == N:
        order[0], order[-1] = order[-1], order[0]
    shape = [d.shape[k] for k in order]
    code = d.pick([f"h.permute({order})", f"torch.permute(h, {order})", f"h.permute({order}).contiguous()"])
    d.set(code, shape, fresh=None)


@block(lambda d: len(d.shape) > 2)
def transpose_in_place(d: Draft) -> None:
    d.own()
    i = 1 if d.shape[0] == N else 0
    j = len(d.shape) - 1 if d.shape[0] == N else 1
    shape = list(d.shape)
    shape[i], shape[j] = shape[j], shape[i]
    if shape[-1] == N:
        return
    d.add(f"h.transpose_({i}, {j})")
    d.shape = tuple(shape)


@block(rows)
def flatten(d: Draft) -> None:
    sizes = d.pick(["len(h), -1", "h.size(0), -1", f"[-1, {d.volume}]"])
    code = d.pick(["h.flatten(1)", f"h.reshape({sizes})", "nn.Flatten()(h)", f"h.contiguous().view({sizes})"])
    d.set(code, (N, d.volume), fresh=None)


@block(wide)
def unflatten(d: Draft) -> None:
    axis = d.axis(2)
    size = d.shape[axis]
    factor = d.pick([k for k in range(1, size + 1) if size % k == 0])
    if len(d.shape) < 5:
        d.set(
            f"h.unflatten({axis}, ({factor}, {size // factor}))", d.with_axis(axis, factor, size // factor), fresh=None
        )


@block(lambda d: len(d.shape) < 5)
def unsqueeze(d: Draft) -> None:
    axis = d.pick(range(1, len(d.shape) + 1))
    in_place = d.odds(3)
    if in_place:
        d.own()
        d.add(f"h.unsqueeze_({axis})")
    else:
        d.add(f"h = h{d.pick([f'.unsqueeze({axis})', '[' + ':, ' * axis + 'None]'])}")
    d.shape = (*d.shape[:axis], 1, *d.shape[axis:])


@block(lambda d: len(d.shape) > 2 and 1 in d.shape[:-1])
def squeeze(d: Draft) -> None:
    axis = d.shape.index(1)
    d.set(f"h.squeeze({axis})", d.with_axis(axis), fresh=None)


@block(roomy, weight=2)
def concatenate(d: Draft) -> None:
    axis = d.axis()
    if axis is None:
        return
    size = d.shape[axis]
    other = d.pick(["h.sin()", f"h.flip({axis})", "-h", "h", "h.detach()", "torch.ones_like(h)"])
    code = d.pick([f"torch.cat([h, {other}], {axis})", f"torch.concat(({other}, h), dim={axis})"])
    d.set(code, d.with_axis(axis, 2 * size))


@block(lambda d: roomy(d) and len(d.shape) < 4)
def stack(d: Draft) -> None:
    axis = d.pick(range(1, len(d.shape)))
    shape = (*d.shape[:axis], 2, *d.shape[axis:])
    d.set(f"torch.stack([h, {d.pick(['h.sin()', 'h.detach()', '2 * h'])}], {axis})", shape)


@block(wide, weight=2)
def split_and_join(d: Draft) -> None:
    axis = d.axis(2)
    size = d.shape[axis]
    forms = ["unbind", "split", "tensor_split", "reversed", "in part", "loop"]
    form = d.pick([*forms, "glu", "chunk"] if size % 2 == 0 else forms)
    half = d.with_axis(axis, size // 2)
    if form == "chunk":
        d.add(f"u, v = h.chunk(2, {axis})")
        d.set(d.pick(["u * v.sigmoid()", "u + v", "torch.maximum(u, v)", "u - v.detach()"]), half)
    elif form == "glu":
        d.set(f"F.glu(h, {axis})", half)
    elif form == "unbind":
        d.set(f"sum(h.unbind({axis}))", d.with_axis(axis)) if len(d.shape) > 2 else d.set("-h")
    elif form == "split":
        d.add(f"u, v = h.split([1, {size - 1}], {axis})")
        d.set(f"torch.cat([v, u.sin()], {axis})")
    elif form == "tensor_split":
        d.add(f"u, v = h.tensor_split(2, {axis})")
        d.set(f"torch.cat([v * 2, u], {axis})")
    elif form == "reversed":
        d.set(f"torch.stack(h.unbind({axis})[::-1], {axis})")
    elif form == "loop":
        d.set(f"torch.stack([part * k for k, part in enumerate(h.unbind({axis}))], {axis})")
    else:
        d.set(f"torch.cat([{d.at(axis, ':1')}.sin(), {d.at(axis, '1:')}], {axis})")


@block(wide, weight=3)
def select(d: Draft) -> None:
    axis = d.axis(2)
    size = d.shape[axis]
    i = d.chance.randrange(size)
    if len(d.shape) > 2 and d.odds(3):
        code = d.pick([d.at(axis, str(i)), f"h.select({axis}, {i})", f"torch.select(h, {axis}, -1)"])
        return d.set(code, d.with_axis(axis), fresh=None)
    ways = [
        (d.at(axis, "1:"), size - 1, None),
        (d.at(axis, "::2"), (size + 1) // 2, None),
        (d.at(axis, ":-1"), size - 1, None),
        (f"h.narrow({axis}, 0, {max(1, i)})", max(1, i), None),
        (f"h.index_select({axis}, torch.tensor([0, {i}]))", 2, True),
        (d.at(axis, f"[{i}, 0, {i}]"), 3, True),
        (d.at(axis, f"torch.arange({size}) != {i}"), size - 1, True),
        (f"h.gather({axis}, torch.zeros_like({d.at(axis, ':2')}, dtype=torch.long))", 2, True),
        (f"h.topk({max(1, i)}, {axis}).values", max(1, i), True),
        (f"h.topk({max(1, i)}, dim={axis}, largest=False)[0]", max(1, i), True),
        (f"h.unfold({axis}, 2, 1).sum(-1)", size - 1, True),
        (f"h.diff(dim={axis})", size - 1, True),
    ]
    code, out, fresh = d.pick(ways)
    return d.set(code, d.with_axis(axis, out), fresh) if d.room(out / size) else None


AT_A_POSITION = [
    "h[torch.arange(len(h)), {0}]",
    "h.gather(1, {0}[:, None, None].expand(-1, 1, h.shape[-1])).squeeze(1)",
    "(F.one_hot({0}, h.shape[1]).to(h)[..., None] * h).sum(1)",
    "torch.stack([row[k] for row, k in zip(h, {0})])",
]


@block(lambda d: sequence(d) and rows(d) and wide(d))
def one_position_of_each_sample(d: Draft) -> None:
    """Pooling at the end token, whose place differs from sample to sample."""
    where = d.pick(["h[..., 0].argmax(1)", "((h[..., 0] > 0).sum(1).clamp(min=1) - 1)", "h.norm(dim=-1).argmin(1)"])
    d.set(d.pick(AT_A_POSITION).format(where), (N, d.shape[2]))


@block(lambda d: sequence(d) and rows(d) and wide(d))
def sort_positions(d: Draft) -> None:
    """Top tokens by a learned score."""
    i, T = d.shape[2], d.shape[1]
    score = f"{d.layer(f'nn.Linear({i}, 1)', (1, i))}(h).squeeze(-1)"
    k = d.pick([T, max(1, T // 2)])
    d.add(f"score, order = ({score}).topk({k}, 1)")
    code = "h.gather(1, order[..., None].expand(-1, -1, h.shape[-1])) * score.sigmoid()[..., None]"
    d.set(code, (N, k, i))


REDUCTIONS = {
    "h.mean({0})": True,
    "torch.mean(h, dim={0})": True,
    "h.sum({0})": True,
    "h.amax({0})": False,
    "h.max({0}).values": True,
    "h.min({0})[0]": True,
    "h.median({0}).values": True,
    "h.logsumexp({0})": False,
    "h.sigmoid().prod({0})": False,
    "h.square().mean({0})": True,
    "(h.square() + 0.1).mean({0}).sqrt()": False,
    "(h * h.softmax({0})).sum({0})": True,
}


@block(lambda d: len(d.shape) > 2, weight=2)
def reduce(d: Draft) -> None:
    axis = d.axis()
    code = d.pick(list(REDUCTIONS))
    d.set(code.format(axis), d.with_axis(axis), fresh=REDUCTIONS[code])


@block(lambda d: rows(d) and wide(d))
def statistics_of_a_sample(d: Draft) -> None:
    dims = list(range(1, len(d.shape)))
    d.set(f"(h - h.mean({dims}, keepdim=True)) / (h.var({dims}, keepdim=True) + 0.1).sqrt()")


@block(lambda d: roomy(d))
def repeat(d: Draft) -> None:
    axis = d.axis()
    if axis is None:
        return None
    size = d.shape[axis]
    times = [1] * len(d.shape)
    times[axis] = 2
    if size == 1 and d.odds(2):
        sizes = [-1] * len(d.shape)
        sizes[axis] = 2
        return d.set(f"h.expand({sizes})", d.with_axis(axis, 2), fresh=False)
    code = d.pick([f"h.repeat({times})", f"h.repeat_interleave(2, {axis})", f"h.tile({times})"])
    return d.set(code, d.with_axis(axis, 2 * size))


@block(lambda d: features(d) and rows(d) and len(d.shape) < 4)
def outer_product(d: Draft) -> None:
    i = d.shape[-1]
    if d.room(i):
        d.set(d.pick(["h[..., None] * h[..., None, :]", "torch.einsum('...i,...j->...ij', h, h.sin())"]), (*d.shape, i))


@block(lambda d: sequence(d) and rows(d))
def gram(d: Draft) -> None:
    T = d.shape[1]
    if T * T <= ROOM:
        d.set(d.pick(["h @ h.mT", "torch.bmm(h, h.transpose(1, 2))", "torch.cdist(h, h + 1)"]), (N, T, T), fresh=False)


@block(samples_first(3, 4, 5), weight=2)
def pool(d: Draft) -> None:
    dims, space = len(d.shape) - 2, d.shape[2:]
    out = tuple(1 + d.chance.randrange(size) for size in space)
    adaptive = f"F.adaptive_{d.pick(['avg', 'max'])}_pool{dims}d(h, {out if dims > 1 else out[0]})"
    ways = [(adaptive, out)]
    if min(space) >= 2:
        ways.append((f"F.max_pool{dims}d(h, 2)", [size // 2 for size in space]))
        ways.append((f"F.avg_pool{dims}d(h, 2, 1)", [size - 1 for size in space]))
        ways.append((f"nn.MaxPool{dims}d(2, stride=1)(h)", [size - 1 for size in space]))
    code, sizes = d.pick(ways)
    d.set(code, (N, d.shape[1], *sizes))


@block(samples_first(3, 4), weight=2)
def resize(d: Draft) -> None:
    dims, space = len(d.shape) - 2, d.shape[2:]
    modes = [("nearest", ""), ("linear" if dims == 1 else "bilinear", ", align_corners=False")]
    mode, option = d.pick(modes)
    if d.room(2**dims) and d.odds(2):
        code = f"F.interpolate(h, scale_factor=2, mode='{mode}'{option})"
        return d.set(code, (N, d.shape[1], *(2 * size for size in space)))
    pads, sizes = [], []
    for size in reversed(space):
        pads += [1, d.pick([0, 1])]
        sizes.insert(0, size + sum(pads[-2:]))
    if d.shape[1] * math.prod(sizes) > ROOM:
        return None
    mode = d.pick(
        ["'constant'", "'constant', 0.3", *(["'reflect'", "'circular'"] if min(space) > 1 else []), "'replicate'"]
    )
    return d.set(f"F.pad(h, {tuple(pads)}, {mode})", (N, d.shape[1], *sizes))


@block(samples_first(4))
def rearrange_channels(d: Draft) -> None:
    C, H, W = d.shape[1:]
    ways = [(f"h.permute(0, 2, 3, 1).reshape(-1, {H * W}, {C})", (H * W, C)), ("h.flatten(2).mT", (H * W, C))]
    if C % 2 == 0:
        ways.append((f"h.view(-1, 2, {C // 2}, {H}, {W}).transpose(1, 2).flatten(1, 2)", (C, H, W)))
    if C % 4 == 0:
        ways.append(("F.pixel_shuffle(h, 2)", (C // 4, 2 * H, 2 * W)))
    if H % 2 == W % 2 == 0:
        ways.append(("F.pixel_unshuffle(h, 2)", (4 * C, H // 2, W // 2)))
        ways.append(("F.unfold(h, 2, stride=2)", (4 * C, H * W // 4)))
    code, shape = d.pick(ways)
    d.set(code.replace("h.view", "h.contiguous().view"), (N, *shape), fresh=None)


@block(always)
def diagonal_mask(d: Draft) -> None:
    if len(d.shape) > 2 and d.shape[-2] != N:
        mask = f"h.new_ones({d.shape[-2]}, {d.shape[-1]}).tril()"
        d.set(d.pick(["h.tril()", "h.triu()", f"h * {mask}", f"h.masked_fill({mask} == 0, 0.2)"]))
    else:
        d.set("h * 0.5 + 0.1")
