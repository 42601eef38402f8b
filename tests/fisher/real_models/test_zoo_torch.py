"""Attention, recurrent layers, experts and checkpoints, as they are built from PyTorch's own parts."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.support.fisher.zoo import (
    CLASSES,
    VARIANTS,
    Case,
    N,
    cases,
    check_case,
    classes,
    padding,
    sum_of_tokens,
    tokens,
)

D = 8
LENGTHS = [N, 6]


class Encoder(nn.Module):
    def __init__(self, batch_first, mask, norm_first=False, layers=2, **options):
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.position = nn.Parameter(torch.randn(6, D))
        layer = nn.TransformerEncoderLayer(D, 2, 12, batch_first=batch_first, norm_first=norm_first, **options)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(D), enable_nested_tensor=not norm_first)
        self.head = nn.Linear(D, CLASSES)
        self.batch_first, self.mask = batch_first, mask

    def forward(self, ids, present):
        h = self.embed(ids) + self.position[: ids.shape[1]]
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], dtype=h.dtype)
        h = self.layers(
            h if self.batch_first else h.transpose(0, 1),
            mask=causal if "causal" in self.mask else None,
            is_causal="causal" in self.mask,
            src_key_padding_mask=~present if "padding" in self.mask else None,
        )
        h = h if self.batch_first else h.transpose(0, 1)
        return self.head((h * present[..., None]).sum(1))


class EncoderDecoder(nn.Module):
    def __init__(self, batch_first, **options):
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.transformer = nn.Transformer(D, 2, 1, 2, 12, batch_first=batch_first, **options)
        self.head = nn.Linear(D, CLASSES)
        self.batch_first = batch_first

    def forward(self, source, target, present):
        a, b = self.embed(source), self.embed(target)
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=b.dtype)
        a, b = (a, b) if self.batch_first else (a.transpose(0, 1), b.transpose(0, 1))
        masks = {"src_key_padding_mask": ~present, "memory_key_padding_mask": ~present}
        h = self.transformer(a, b, tgt_mask=causal, tgt_is_causal=True, **masks)
        return self.head(h if self.batch_first else h.transpose(0, 1))


class Decoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerDecoderLayer(D, 2, 12, batch_first=batch_first, activation="gelu")
        self.layers, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(D, CLASSES)
        self.batch_first = batch_first

    def forward(self, x, memory):
        if not self.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        h = self.layers(x, memory)
        return self.head(h.mean(1 if self.batch_first else 0))


class Attention(nn.Module):
    def __init__(self, batch_first, cross=False, weights=False, **options):
        super().__init__()
        options |= {"kdim": 6, "vdim": 4} if cross else {}
        self.attend = nn.MultiheadAttention(D, 2, batch_first=batch_first, **options)
        self.query = nn.Parameter(torch.randn(3, D))
        self.head = nn.Linear(D, CLASSES)
        self.batch_first, self.cross, self.weights = batch_first, cross, weights

    def forward(self, x, present):
        q = torch.tanh(x) if not self.cross else self.query.expand(len(x), -1, -1)
        k, v = (x[..., :6], x[..., :4]) if self.cross else (x, x)
        if not self.batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        h, weights = self.attend(q, k, v, key_padding_mask=~present, need_weights=self.weights)
        out = self.head(h.mean(1 if self.batch_first else 0))
        return out * (1 + weights[:, :, :1].std(1)) if self.weights else out


class Recurrent(nn.Module):
    def __init__(self, kind, packed=False, batch_first=True, **options):
        super().__init__()
        self.rnn = kind(5, 6, 2, batch_first=batch_first, **options)
        self.head = nn.LazyLinear(CLASSES)
        self.packed, self.batch_first = packed, batch_first
        self.head(torch.zeros(1, self.rnn(torch.zeros(1, 1, 5))[0].shape[-1]))

    def forward(self, x, lengths):
        x = x if self.batch_first else x.transpose(0, 1)
        if not self.packed:
            h = self.rnn(x)[0]
        else:
            options = {"batch_first": self.batch_first}
            h = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False, **options)
            h = nn.utils.rnn.pad_packed_sequence(self.rnn(h)[0], **options)[0]
        return self.head(h.sum(1 if self.batch_first else 0))


class Cells(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x, lengths):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Experts(nn.Module):
    """Each expert gets the tokens sent to it: any number of rows, which may be the number of samples, and none."""

    def __init__(self, experts, chosen):
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.router = nn.Linear(D, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, 6), nn.GELU(), nn.Linear(6, D)) for _ in range(experts))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, CLASSES)
        self.chosen = chosen

    def forward(self, ids, present):
        h = self.embed(ids).flatten(0, 1)
        weights, indices = self.router(h).softmax(1).topk(self.chosen)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(indices == i)
            if len(rows):
                out.index_add_(0, rows, expert(h[rows]) * weights[rows, slots, None])
        h = self.norm(h + out).view(*ids.shape, -1)
        return self.head((h * present[..., None]).sum(1))


class MaskedTokens(nn.Module):
    """A head on some tokens only, gathered from all samples."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(20, D), nn.Linear(D, D)
        self.head = nn.Linear(D, CLASSES)

    def forward(self, ids, masked):
        scores = self.head(torch.tanh(self.layer(self.embed(ids))[masked]))
        return torch.zeros(*ids.shape, CLASSES, dtype=scores.dtype).index_put((*torch.where(masked),), scores)


def masked_tokens(*counts):
    masked = torch.arange(6) < torch.tensor(counts)[:, None]
    labels = torch.randint(0, CLASSES, (N, 6)).masked_fill(~masked, -100)
    return Case(MaskedTokens(), (tokens(6), masked), labels, sum_of_tokens)


class TwoNames(nn.Module):
    """One layer under two names, as peft and tied encoders have it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.layer = nn.Linear(D, D)
        self.same, self.words = self.layer, self.embed
        self.head = nn.Linear(D, CLASSES)

    def forward(self, ids, present):
        h = self.same(torch.tanh(self.layer(self.words(ids)))) * present[..., None]
        return self.head(torch.tanh(h).mean(1))


class Converted(nn.Module):
    """Converts a layer where it uses it, as routers do."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(20, D), nn.Linear(D, D), nn.Linear(D, CLASSES)
        self.gate = nn.Parameter(torch.randn(D))

    def forward(self, ids, present):
        self.layer = self.layer.to(self.embed.weight.dtype)
        h = torch.tanh(self.layer(self.embed(ids) * self.gate)) * present[..., None]
        return self.head(h.mean(1))


def attention_case(model, length=6):
    return Case(model, (torch.randn(N, length, D), padding(length)), classes())


def token_case(model, length=6):
    return Case(model, (tokens(length), padding(length)), classes())


def recurrent_case(model, length=6):
    return Case(model, (torch.randn(N, length, 5), padding(length).sum(1)), classes())


SEQUENCES = {
    f"encoder {'batch' if batch_first else 'time'} first, {length} tokens, {mask}": partial(
        lambda *args: token_case(Encoder(*args[:2], norm_first=args[2] == 6), args[2]), batch_first, mask, length
    )
    for batch_first in (True, False)
    for length in LENGTHS
    for mask in ("no mask", "causal", "padding", "causal and padding")
} | {
    "encoder, relu in place": lambda: token_case(Encoder(True, "none", activation=nn.ReLU(inplace=True)), N),
    "encoder, gelu, no biases": lambda: token_case(Encoder(True, "padding", activation="gelu", bias=False)),
    "encoder-decoder": lambda: Case(
        EncoderDecoder(True), (tokens(6), tokens(5), padding(6)), torch.randint(0, CLASSES, (N, 5)), "tokens"
    ),
    "encoder-decoder, time first": lambda: Case(
        EncoderDecoder(False), (tokens(N), tokens(N), padding(N)), torch.randint(0, CLASSES, (N, N)), "tokens"
    ),
    "encoder-decoder, norm first": lambda: Case(
        EncoderDecoder(True, norm_first=True),
        (tokens(N), tokens(6), padding(N)),
        torch.randint(0, CLASSES, (N, 6)),
        "tokens",
    ),
    "decoder": lambda: Case(Decoder(True), (torch.randn(N, 6, D), torch.randn(N, N, D)), classes()),
    "decoder, time first": lambda: Case(Decoder(False), (torch.randn(N, N, D), torch.randn(N, 6, D)), classes()),
    "attention": lambda: attention_case(Attention(True)),
    "attention, time first": lambda: attention_case(Attention(False), N),
    "attention, weights used": lambda: attention_case(Attention(True, weights=True)),
    "attention, across": lambda: attention_case(Attention(True, cross=True)),
    "attention, across, time first": lambda: attention_case(Attention(False, cross=True), N),
    "attention, bias_kv": lambda: attention_case(Attention(True, add_bias_kv=True, add_zero_attn=True)),
    "rnn": lambda: recurrent_case(Recurrent(nn.RNN)),
    "rnn, relu, time first": lambda: recurrent_case(Recurrent(nn.RNN, nonlinearity="relu", batch_first=False), N),
    "lstm": lambda: recurrent_case(Recurrent(nn.LSTM, bidirectional=True)),
    "lstm, projected": lambda: recurrent_case(Recurrent(nn.LSTM, proj_size=3)),
    "lstm, packed": lambda: recurrent_case(Recurrent(nn.LSTM, packed=True, bidirectional=True)),
    "lstm, packed, time first": lambda: recurrent_case(Recurrent(nn.LSTM, packed=True, batch_first=False), N),
    "gru": lambda: recurrent_case(Recurrent(nn.GRU, bidirectional=True, batch_first=False), N),
    "gru, packed": lambda: recurrent_case(Recurrent(nn.GRU, packed=True)),
    "experts": lambda: token_case(Experts(3, 2)),
    "experts, one a token": lambda: token_case(Experts(5, 1), N),
    "experts, few tokens": lambda: token_case(Experts(4, 1), 2),
    "head on as many tokens as samples": lambda: masked_tokens(2, 1, 1, 0),
    "head on one token of each sample": lambda: masked_tokens(1, 1, 1, 1),
    "head on some tokens": lambda: masked_tokens(3, 0, 2, 1),
    "one layer under two names": lambda: token_case(TwoNames()),
    "layer converted in forward": lambda: token_case(Converted()),
    "lstm cells": lambda: recurrent_case(Cells(nn.LSTMCell)),
    "gru cells": lambda: recurrent_case(Cells(nn.GRUCell)),
}
sequence = cases(SEQUENCES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sequences(sequence, variant):
    check_case(sequence, variant)


class Checkpointed(nn.Module):
    """Segments of several layers, whose outputs are thrown away and computed again in the backward pass."""

    def __init__(self, reentrant, nested=False):
        super().__init__()
        self.embed = nn.Linear(5, D)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D)) for _ in range(3))
        self.gate = nn.Parameter(torch.randn(D))
        self.head = nn.Linear(D, CLASSES)
        self.reentrant, self.nested = reentrant, nested

    def segment(self, block, h):
        h = checkpoint(block, h, use_reentrant=self.reentrant) if self.nested else block(h)
        return h * self.gate

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + checkpoint(self.segment, block, h, use_reentrant=self.reentrant)
        return self.head(h.flatten(1, -2).mean(1) if h.dim() > 2 else h)


class CheckpointedWhole(nn.Module):
    """Also the input layer and the head; dropout that draws nothing; a batch norm with its running statistics."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(6 * 36, CLASSES), nn.Dropout(0.5))

    def forward(self, x):
        return checkpoint(lambda: self.head(self.body(x)), use_reentrant=False)


class CheckpointedSequential(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.embed = nn.Linear(5, D)
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(D, D), nn.GELU()) for _ in range(4)])
        self.head = nn.Linear(D, CLASSES)
        self.reentrant = reentrant

    def forward(self, x):
        return self.head(checkpoint_sequential(self.blocks, 2, self.embed(x), use_reentrant=self.reentrant))


def recomputed(model, *shape):
    return Case(model, torch.randn(N, *shape), classes(), recomputes=True)


CHECKPOINTS = {
    "one row per sample": lambda: recomputed(Checkpointed(False), 5),
    "sequences": lambda: recomputed(Checkpointed(False), N, 5),
    "nested": lambda: recomputed(Checkpointed(False, nested=True), 3, 5),
    "reentrant": lambda: recomputed(Checkpointed(True), 5),
    "reentrant, sequences": lambda: recomputed(Checkpointed(True), N, 5),
    "whole model": lambda: recomputed(CheckpointedWhole(), 3, 8, 8),
    "sequential": lambda: recomputed(CheckpointedSequential(False), 5),
    "sequential, reentrant": lambda: recomputed(CheckpointedSequential(True), 5),
}
checkpointed = cases(CHECKPOINTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpoints(checkpointed, variant):
    check_case(checkpointed, variant)
