"""Blocks with parameters: the layers of torch.nn and parameters by themselves."""

from __future__ import annotations

from .draft import ROOM, Draft, N, always, block, features, rows, samples_first, sequence, wide

ACTIVATIONS = ["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Tanh()", "nn.GELU()", "nn.SiLU(inplace=True)"]
CLASSES = ["nn.Linear", "nn.Linear", "nn.Linear", "ScaledLinear"]


def chunk_of(d: Draft, size: int) -> int:
    """A divisor."""
    return d.pick([k for k in range(1, size + 1) if size % k == 0])


@block(features, weight=6)
def linear(d: Draft) -> None:
    i, o = d.shape[-1], d.size()
    bias = "" if d.odds(4) is False else ", bias=False"
    layer = d.layer(f"{d.pick(CLASSES)}({i}, {o}{bias})", (o, i), hooks=True)
    d.call(layer, (*d.shape[:-1], o))


def fitting_call(d: Draft) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Layers that take ``h``, and made something of the same size."""
    return [call for call in d.calls if call[1] == d.shape]


@block(lambda d: bool(fitting_call(d)), weight=8)
def called_again(d: Draft) -> None:
    layer, _, shape = d.pick(fitting_call(d))
    d.call(layer, shape)


def fitting_weights(d: Draft) -> list[tuple[str, int]]:
    """Weights of layers that fit the features as they are or transposed, and the features afterwards."""
    i = d.shape[-1]
    matrices = [(shape, name) for shape, names in d.weights.items() if len(shape) == 2 for name in names]
    straight = [(f"{name}.t()", shape[0]) for shape, name in matrices if shape[1] == i]
    return straight + [(name, shape[1]) for shape, name in matrices if shape[0] == i]


@block(lambda d: bool(fitting_weights(d)), weight=4)
def tied(d: Draft) -> None:
    """By a layer that shares the weight, or by a function."""
    i = d.shape[-1]
    weight, o = d.pick(fitting_weights(d))
    if weight.endswith(".t()") and d.odds(2):
        name = f"self.{d.name('l')}"
        d.setup += [f"{name} = nn.Linear({i}, {o})", f"{name}.weight = {weight[:-4]}"]
        d.kinds[name] = "nn.Linear"
        d.call(name, (*d.shape[:-1], o))
    else:
        d.set(d.pick([f"h @ {weight}", f"torch.sin(h @ {weight})"]), (*d.shape[:-1], o))
    d.learned = True


@block(features)
def perceptron(d: Draft) -> None:
    i, hidden = d.shape[-1], d.size()
    kind = d.pick(["nn.Sequential", "Residual"])
    layer = f"{kind}(nn.Linear({i}, {hidden}), {d.pick(ACTIVATIONS)}, nn.Linear({hidden}, {i}))"
    d.set(f"{d.layer(layer)}(h)")


@block(features)
def adapter(d: Draft) -> None:
    i, o, rank = d.shape[-1], d.size(), d.size(3)
    kind = d.pick(["LoRA", "by hand", "gained"])
    shape = (*d.shape[:-1], o)
    if kind == "LoRA":
        d.set(f"{d.layer(f'LoRA({i}, {o}, {rank})')}(h)", shape)
    elif kind == "gained":
        d.set(f"{d.layer(f'Gained(nn.Linear({i}, {o}), {o})')}(h)", shape)
    else:
        base = d.layer(f"nn.Linear({i}, {o})", (o, i))
        a = d.layer(f"nn.Linear({i}, {rank}, bias=False)", (rank, i))
        b = d.layer(f"nn.Linear({rank}, {o}, bias=False)", (o, rank))
        d.set(f"{base}(h) + {b}({a}(h)) * 2", shape)


@block(features, unusual=True)
def weight_used_by_a_function(d: Draft) -> None:
    i, o = d.shape[-1], d.size()
    layer = d.layer(f"nn.Linear({i}, {o})", (o, i))
    code = d.pick(
        [
            f"{layer}(h) + F.linear(h, {layer}.weight)",
            f"F.linear(h, {layer}.weight, {layer}.bias)",
            f"{layer}(h) * {layer}.weight.mean()",
            f"F.linear(torch.tanh({layer}(h)) @ {layer}.weight, {layer}.weight)",
            f"F.linear(h, F.normalize({layer}.weight, dim=1)) + {layer}.bias",
            f"F.linear(h, {layer}.weight - {layer}.weight.mean(), {layer}.bias)",
            f"{layer}(h) + torch.einsum('oi,...i->...o', {layer}.weight, h)",
            f"functional_call({layer}, {{'bias': {layer}.weight.sum(1)}}, (h,))",
            f"functional_call({layer}, {{'weight': {{0}}}}, (h,))",
            f"functional_call({layer}, dict({layer}.named_parameters()), (h,)) + {layer}(h)",
        ]
    )
    if layer in d.hooked:  # whose weight is not there until it is called
        code = f"{layer}(h) * {layer}.weight.mean()"
    if d.odds(4):
        with d.inside("with torch.no_grad():"):
            d.add(f"{layer}(h)")
    d.set(code.replace("{0}", d.parameter(o, i)) if "{0}" in code else code, (*d.shape[:-1], o))


@block(features, unusual=True)
def vmapped_layer(d: Draft) -> None:
    i, o = d.shape[-1], d.size()
    layer = d.layer(f"nn.Linear({i}, {o})", (o, i))
    d.set(f"torch.vmap({layer}, {d.n}, {d.n})(h)" if d.n < len(d.shape) - 1 else f"{layer}(h)", (*d.shape[:-1], o))


@block(features)
def layer_of_parameters(d: Draft) -> None:
    """A layer whose rows are not samples, though there may be as many."""
    i, count = d.shape[-1], d.size()
    layer = d.layer(f"nn.Linear({i}, {i})", (i, i))
    sources = ["parameter", f"torch.eye({i}, dtype=h.dtype)[:{count}]"]
    source = d.pick(sources if layer in d.hooked else [*sources, f"{layer}.weight"])
    source = d.parameter(count, i) if source == "parameter" else source
    d.set(f"h @ torch.tanh({layer}({source})).t()[:, :1] + h")
    if d.odds(3):
        table = d.layer(f"nn.Embedding(5, {i})", (5, i))
        d.set(f"h * {table}(torch.arange({count})).sum(0)")


@block(features, weight=2)
def norm_of_features(d: Draft) -> None:
    i = d.shape[-1]
    form = str(i)
    if len(d.shape) > 2 and d.shape[-2] != N and d.odds(3):
        form = str([*d.shape[-2:]])
    affine = d.pick(["", "", ", elementwise_affine=False"])
    bias = ", bias=False" if not affine and d.odds(5) else ""
    kind = f"nn.LayerNorm({form}{affine}{bias})" if d.odds(3) is False else f"nn.RMSNorm({form}{affine})"
    layer = d.layer(kind, (i,) if form == str(i) and not affine else None, hooks=True)
    d.call(layer, d.shape)


@block(samples_first(2, 3, 4, 5), weight=2)
def norm_of_channels(d: Draft) -> None:
    channels, dims = d.shape[1], max(1, len(d.shape) - 2)
    kinds = [f"nn.BatchNorm{dims}d({channels})", f"nn.BatchNorm{dims}d({channels}, affine=False)"]
    groups = chunk_of(d, channels)
    if d.volume > groups:
        kinds += [f"nn.GroupNorm({groups}, {channels})"] * 2
    if len(d.shape) > 2 and d.volume >= 2 * channels:
        track = d.pick(["", ", track_running_stats=True"])
        kinds += [f"nn.InstanceNorm{dims}d({channels}, affine=True{track})"] * 2
    code = d.pick(kinds)
    d.note(code[3 : code.index("(")])
    d.call(d.layer(code, (channels,) if "affine=False" not in code else None, hooks=True), d.shape)


@block(always)
def prelu(d: Draft) -> None:
    count = d.shape[1] if d.shape[0] == N and d.odds(2) else 1
    d.call(d.layer(f"nn.PReLU({count})"), d.shape)


@block(features)
def bilinear(d: Draft) -> None:
    i, o = d.shape[-1], d.size(3)
    d.set(f"{d.layer(f'nn.Bilinear({i}, {i}, {o})')}(h, {d.pick(['h', 'h.flip(-1)', 'h.sin()'])})", (*d.shape[:-1], o))


@block(samples_first(3, 4, 5), weight=5)
def convolution(d: Draft) -> None:
    dims, channels, space = len(d.shape) - 2, d.shape[1], d.shape[2:]
    out = d.size()
    groups = d.pick([1, 1, channels])
    out = out if groups == 1 else groups * d.pick([1, 1, 2])
    kernel = [1 + d.chance.randrange(min(3, size)) for size in space]
    stride, dilation, padding, extra = 1, 1, 0, ""
    form = d.pick(["plain", "stride", "padding", "same", "dilation", "mode", "transposed"])
    if form == "transposed":
        stride = d.pick([1, 2])
        sizes = [(size - 1) * stride + k for size, k in zip(space, kernel, strict=True)]
    else:
        stride = 2 if form == "stride" else 1
        padding = 1 if form in ("padding", "mode") else 0
        if form == "dilation":
            dilation, kernel = 2, [min(k, (size + 1) // 2) for size, k in zip(space, kernel, strict=True)]
        if form == "mode":
            padding = 1 if min(space) > 1 else 0
            extra = f", padding_mode='{d.pick(['circular', 'reflect', 'replicate'])}'"
        sizes = [(s + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for s, k in zip(space, kernel, strict=True)]
        sizes = space if form == "same" else sizes
    if out * max(1, *sizes) ** dims > 2 * ROOM and form in ("transposed", "padding", "mode"):
        return
    d.note(f"convolution {form}")
    size = tuple(kernel) if dims > 1 else kernel[0]
    extra += ", bias=False" if d.odds(4) else ""
    extra += f", groups={groups}" if groups > 1 else ""
    pads = "'same'" if form == "same" else padding
    if form == "transposed":
        code = f"nn.ConvTranspose{dims}d({channels}, {out}, {size}, stride={stride}{extra})"
        weight = (channels, out // groups, *kernel)
    else:
        code = f"nn.Conv{dims}d({channels}, {out}, {size}, stride={stride}, padding={pads}, dilation={dilation}{extra})"
        weight = (out, channels // groups, *kernel)
    if dims == 2 and form == "plain" and d.odds(4):
        code = code.replace("nn.", "Standardised")
    d.call(d.layer(code, weight, hooks=True), (N, out, *sizes))


TABLES = ["", "", ", padding_idx=1", ", max_norm=1.0", ", scale_grad_by_freq=True", ", sparse=True"]


@block(features, weight=2)
def embedding_of_signs(d: Draft) -> None:
    """Tokens that depend on the data."""
    i, option = d.shape[-1], d.pick(TABLES)
    tokens = d.pick(["(h[..., 0] > 0).long()", "h.argmax(-1)", "h[..., -1].detach().mul(2).long().clamp(0, 2)"])
    count = max(3, i)
    layer = d.layer(f"nn.Embedding({count}, {i}{option})", (count, i) if not option else None)
    d.set(
        d.pick(
            [f"h + {layer}({tokens})", f"{layer}({tokens}) * h", f"torch.cat([h, {layer}({tokens})], -1)[..., :{i}]"]
        )
    )


@block(samples_first(3))
def bag_of_signs(d: Draft) -> None:
    T, i = d.shape[1], d.shape[2]
    embed_bag(d, f"(h.detach().abs() * 2).long().clamp(max=4)[..., {i - 1}]", "h[..., 0]" if d.odds(2) else "", T)


def embed_bag(d: Draft, tokens: str, weights: str, T: int) -> None:
    o, mode = d.size(), d.pick(["mean", "sum", "max"])
    options = ["", ", padding_idx=1", ", max_norm=1.0"]
    options += [", sparse=True", ", scale_grad_by_freq=True"] if mode != "max" else []
    code = f"nn.EmbeddingBag(5, {o}, mode='{mode}'{d.pick(options)})"
    d.note(f"EmbeddingBag {mode}")
    layer = d.layer(code)
    if weights and mode == "sum" and "scale" not in code:
        d.set(f"{layer}({tokens}, per_sample_weights={weights})", (N, o))
    elif d.odds(2):
        d.add(f"tokens = {tokens}")
        d.set(f"{layer}(tokens.flatten(), torch.arange(len(tokens)) * {T})", (N, o))
    else:
        d.set(f"{layer}({tokens})", (N, o))


@block(always, weight=3)
def bare_parameter(d: Draft) -> None:
    shape = d.broadcast()
    if d.odds(4):
        d.note("part of a parameter")
        p = d.pick(["{0}[1]", "{0}.sum(0)", "({0}[0] * {0}[1])", "{0}.unbind(0)[0]"]).format(d.parameter(2, *shape))
    else:
        p = d.parameter(*shape)
    ways = ["h * {0}", "h + {0}", "torch.addcmul(h, h, {0})", "torch.where(h > 0, h, {0})", "torch.maximum(h, {0})"]
    in_place = ["h *= {0}", "h += {0}", "h.add_({0})", "h.mul_({0}).add_({0})", "h[...] = h + {0}"]
    way = d.pick([*ways, *in_place])
    if way in ways:
        d.set(way.format(p))
    else:
        d.own()
        d.add(way.format(p))


PRODUCTS = [
    "h @ {0}",
    "torch.matmul(h, {0})",
    "torch.einsum('...i,io->...o', h, {0})",
    "torch.tensordot(h, {0}, 1)",
    "(h[..., None] * {0}).sum(-2)",
    "({0}.t() @ h[..., None])[..., 0]",
    "Affine.apply(h, {0}.t())",
]


@block(features)
def product_with_parameter(d: Draft) -> None:
    i, o = d.shape[-1], d.size()
    d.set(d.pick(PRODUCTS).format(d.parameter(i, o)), (*d.shape[:-1], o))


@block(lambda d: sequence(d) and rows(d))
def product_from_the_left(d: Draft) -> None:
    o = d.size()
    code = d.pick(["{0} @ h", "torch.einsum('ot,nti->noi', {0}, h)", "(h.mT @ {0}.mT).mT", "F.linear(h.mT, {0}).mT"])
    d.set(code.format(d.parameter(o, d.shape[1])), (N, o, d.shape[2]))


@block(lambda d: features(d) and len(d.shape) == 2)
def weights_of_each_sample(d: Draft) -> None:
    """A layer whose output is the weight of another."""
    i, o = d.shape[-1], d.size(3)
    layer = d.layer(f"nn.Linear({i}, {i * o})", (i * o, i))
    d.set(f"torch.einsum('ni,nio->no', h, {layer}(h).view(-1, {i}, {o}))", (N, o))


@block(lambda d: sequence(d) and wide(d), weight=2)
def class_token(d: Draft) -> None:
    axis, T, i = (1 - d.n), d.shape[1 - d.n], d.shape[-1]
    if not d.room((T + 1) / T):
        return
    token = d.parameter(1, 1, i)
    sizes = f"len(h), 1, {i}" if d.n == 0 else f"1, h.shape[1], {i}"
    repeats = "len(h), 1, 1" if d.n == 0 else "1, h.shape[1], 1"
    tokens = d.pick(
        [f"{token}.expand({sizes})", f"{token}.repeat({repeats})", f"{token} + torch.zeros_like({d.at(axis, ':1')})"]
    )
    d.set(f"torch.cat([{d.pick([f'{tokens}, h', f'h, {tokens}'])}], {axis})", d.with_axis(axis, T + 1))
    position_embedding(d)


@block(sequence)
def position_embedding(d: Draft) -> None:
    axis, T, i = (1 - d.n), d.shape[1 - d.n], d.shape[-1]
    form = d.pick(["parameter", "added in place", "table"])
    shape = (1, T, i) if d.n == 0 else (T, 1, i)
    if form == "table":
        table = d.layer(f"nn.Embedding({T + 1}, {i})", (T + 1, i))
        d.set(f"h + {table}(torch.arange({T})).unsqueeze({1 - axis})")
    elif form == "parameter":
        d.set(f"h + {d.parameter(*shape)}")
    else:
        d.own()
        d.add(f"h += {d.parameter(*shape)}")
