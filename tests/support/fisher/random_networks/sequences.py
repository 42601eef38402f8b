"""Blocks with parameters for sequences: attention, transformers, recurrence."""

from __future__ import annotations

from .draft import Draft, N, block, features, rows, samples_first, sequence
from .layers import ACTIVATIONS, chunk_of


def first(d: Draft) -> str:
    return f"batch_first={d.shape[0] == N}"


@block(sequence, weight=3)
def attention_layer(d: Draft) -> None:
    i, T = d.shape[-1], d.shape[1 - d.n]
    options = d.pick(["", "", ", bias=False", ", add_bias_kv=True", ", add_zero_attn=True", f", kdim={i}, vdim={i}"])
    layer = d.layer(f"nn.MultiheadAttention({i}, {chunk_of(d, i)}, {first(d)}{options})")
    form = d.pick(["self", "mask", "without weights", "cross", "queries", "keys"])
    d.note(f"attention {form}")
    if form == "mask":
        d.set(f"{layer}(h, h, h, attn_mask=torch.ones({T}, {T}, dtype=torch.bool).triu(1))[0]")
    elif form == "cross":
        d.set(f"{layer}(h, h.flip({1 - d.n}), h)[0]")
    elif form in ("queries", "keys"):
        count = d.size(3)
        learned = d.parameter(*((1, count, i) if d.n == 0 else (count, 1, i)))
        learned += f".expand({'len(h), -1, -1' if d.n == 0 else '-1, h.shape[1], -1'})"
        d.add(f"q = {learned}")
        shape = d.with_axis(1 - d.n, count) if form == "queries" else d.shape
        d.set(f"{layer}({'q, h, h' if form == 'queries' else 'h, q, q'})[0]", shape)
    else:
        d.set(f"{layer}(h, h, h{', need_weights=False' if form == 'without weights' else ''})[0]")


@block(sequence, weight=2)
def transformer_layer(d: Draft) -> None:
    i, T = d.shape[-1], d.shape[1 - d.n]
    activation = d.pick(["'relu'", "'gelu'", "nn.ReLU(inplace=True)", "F.silu"])
    kind = d.pick(["Encoder", "Encoder", "Encoder", "Decoder"])
    options = f"{first(d)}, norm_first={d.odds(2)}, activation={activation}{', bias=False' if d.odds(5) else ''}"
    layer = d.layer(f"nn.Transformer{kind}Layer({i}, {chunk_of(d, i)}, {d.size()}, {options})")
    if kind == "Decoder":
        d.set(f"{layer}(h, h.tanh())", fresh=False)
    elif d.odds(3):
        d.set(f"{layer}(h, src_mask=torch.full(({T}, {T}), float('-inf'), dtype=h.dtype).triu(1))", fresh=False)
    elif d.n == 0 and d.odds(3):
        d.set(f"{layer}(h, src_key_padding_mask=F.pad(h.detach()[:, 1:, 0] > 0, (1, 0)))", fresh=False)
    else:
        d.set(f"{layer}(h)", fresh=False)


@block(sequence)
def transformer_encoder(d: Draft) -> None:
    """Two layers, for which torch has a nested and a fused way of its own."""
    i = d.shape[-1]
    inner = f"nn.TransformerEncoderLayer({i}, {chunk_of(d, i)}, 3, {first(d)})"
    layer = d.layer(f"nn.TransformerEncoder({inner}, 2)")
    if d.n == 0 and d.odds(2):
        d.add("empty = F.pad(h.detach()[:, 1:, 0] > 0, (1, 0)).sort(1).values")  # padding comes last
        d.set(f"{layer}(h, src_key_padding_mask=empty).masked_fill(empty[..., None], 0)", fresh=True)
    else:
        d.set(f"{layer}(h)", fresh=False)


@block(sequence, weight=3)
def attention_by_hand(d: Draft) -> None:
    i, T = d.shape[-1], d.shape[1 - d.n]
    if not d.room(3):
        return
    layer = d.layer(f"nn.Linear({i}, {3 * i})", (3 * i, i))
    form = d.pick(["softmax", "sdpa", "heads", "einsum", "bias table", "masked in place"])
    d.note(f"attention by hand: {form}")
    if form == "sdpa" and d.n == 0:
        d.add(f"q, k, v = {layer}(h).chunk(3, -1)")
        d.set(f"F.scaled_dot_product_attention(q, k, v, is_causal={d.odds(2)})", fresh=False)
    elif form == "heads" and d.n == 0:
        heads = chunk_of(d, i)
        d.add(f"q, k, v = {layer}(h).view(-1, {T}, 3, {heads}, {i // heads}).permute(2, 0, 3, 1, 4)")
        d.set(f"((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(-1, {T}, {i})")
    elif form == "bias table":
        d.add(f"q, k, v = {layer}(h).transpose(0, {d.n}).split({i}, -1)")
        d.add(f"t = torch.arange({T})")
        d.add(f"near = {d.parameter(2 * T - 1)}[(t[:, None] - t + {T - 1}).flatten()].view({T}, {T})")
        d.set(f"((q @ k.mT + near).softmax(-1) @ v).transpose(0, {d.n})")
    elif form == "masked in place":
        d.add(f"q, k, v = {layer}(h).transpose(0, {d.n}).chunk(3, dim=-1)")
        d.add("scores = q @ k.transpose(1, 2)")
        d.add(f"scores.masked_fill_(torch.ones({T}, {T}, dtype=torch.bool).triu(1), float('-inf'))")
        d.set(f"(F.softmax(scores, -1) @ v).transpose(0, {d.n})")
    else:
        d.add(f"q, k, v = {layer}(h).chunk(3, -1)")
        a, b = ("nti,nsi->nts", "nts,nsi->nti") if d.n == 0 else ("tni,sni->nts", "nts,sni->tni")
        d.set(f"torch.einsum('{b}', torch.einsum('{a}', q, k).softmax(-1), v)")


@block(sequence, weight=2)
def recurrent(d: Draft) -> None:
    i, T, o = d.shape[-1], d.shape[1 - d.n], d.size(3)
    kind = d.pick(["GRU", "LSTM", "RNN"])
    options, ways, out, layers = first(d), 1, o, 1
    if d.odds(4):
        options, ways = options + ", bidirectional=True", 2
    if d.odds(5):
        options, layers = options + ", num_layers=2", 2
    if kind == "LSTM" and o > 1 and d.odds(4):
        options, out = options + ", proj_size=1", 1
    if d.odds(5):
        options += ", bias=False"
    d.note(kind)
    layer = d.layer(f"nn.{kind}({i}, {o}, {options})")
    shape = (*d.shape[:-1], out * ways)
    form = d.pick(["outputs", "outputs", "state", "packed", "initial"])
    if form == "state":
        state = f"{layer}(h)[1]{'[0]' if kind == 'LSTM' else ''}"
        d.set(f"{state}[-1]", (N, out))
    elif form == "packed" and d.n == 0:
        d.add("lengths = (h[..., 0] > 0).sum(1).clamp(min=1)")
        d.add("packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)")
        d.set(f"pad_packed_sequence({layer}(packed)[0], batch_first=True, total_length={T})[0]", shape)
    elif form == "initial" and kind != "LSTM":
        start = d.parameter(layers * ways, 1, o)
        d.set(f"{layer}(h, {start}.expand(-1, h.shape[{d.n}], -1).contiguous())[0]", shape)
    else:
        d.set(f"{layer}(h)[0]", shape)


@block(sequence)
def cell_in_a_loop(d: Draft) -> None:
    i, T, o, axis = d.shape[-1], d.shape[1 - d.n], d.size(3), 1 - d.n
    kind = d.pick(["GRUCell", "LSTMCell", "RNNCell"])
    d.note(kind)
    cell = d.layer(f"nn.{kind}({i}, {o}{', bias=False' if d.odds(4) else ''})")
    d.add("state = None")
    d.add("outputs = []")
    with d.inside(f"for t in range({T}):"):
        d.add(f"state = {cell}(h.select({axis}, t), state)")
        d.add(f"outputs.append(state{'[0]' if kind == 'LSTMCell' else ''})")
    code, shape = d.pick([("outputs[-1]", (N, o)), (f"torch.stack(outputs, {axis})", (*d.shape[:-1], o))])
    d.set(code, shape, fresh="stack" in code)


@block(lambda d: features(d) and rows(d) and len(d.shape) > 2)
def layer_in_a_loop(d: Draft) -> None:
    """One layer at every position, written into a tensor that is there."""
    i, T, o = d.shape[-1], d.shape[1], d.size()
    layer = d.layer(f"nn.Linear({i}, {o})", (o, i), hooks=True)
    shape = (*d.shape[:-1], o)
    d.add(f"out = h.new_zeros(len(h), {', '.join(map(str, shape[1:]))})")
    with d.inside(f"for t in range({T}):"):
        d.add(d.pick([f"out[:, t] = {layer}(h[:, t])", f"out[:, t] += {layer}(h[:, t])"]))
    d.set("out", shape)


@block(samples_first(3))
def patches(d: Draft) -> None:
    """What a vision transformer starts with: a strided convolution, flattened to a sequence."""
    if d.shape[2] < 2:
        return
    o = d.size()
    conv = d.layer(f"nn.Conv1d({d.shape[1]}, {o}, 2, stride=2)", (o, d.shape[1], 2), hooks=True)
    d.set(f"{conv}(h).flatten(2).transpose(1, 2)", (N, d.shape[2] // 2, o))


@block(sequence)
def mixer(d: Draft) -> None:
    """A perceptron across the positions."""
    axis, o = 1 - d.n, d.size()
    layer = d.layer(f"nn.Sequential(nn.Linear({d.shape[axis]}, {o}), {d.pick(ACTIVATIONS)})")
    d.set(f"{layer}(h.movedim({axis}, -1)).movedim(-1, {axis})", d.with_axis(axis, o), fresh=False)
