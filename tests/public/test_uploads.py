"""Random calls of the public interface, right and wrong ones, as its documentation has them.

A right call gives the documented value, whichever way in it takes. A contribution that cannot be used rejects its
client by name, and the round is what it would be without that client. A wrong call is an error that names the argument.
Nothing else ever happens: no input changes, and no rule remembers a call that failed.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fdcr_fast
from fdcr_fast import AggregationRule
from tests.support.public_rounds import RULES, assert_same_result, bits, plain, rules_and_rounds
from tests.support.ways_in import WAYS, carries_buffers

# Those of which the documentation says that kept updates are averaged by the weights of the result.
AVERAGES = [
    *("fdcr", "fdcr of the published code", "fdcr, bare", "coalition", "fedavg", "norm clipping", "krum", "multi-krum"),
    *("foolsgold", "dnc", "multi-metrics", "sageflow"),
]


def test_every_rule_is_drawn():
    exported = {x for x in vars(fdcr_fast).values() if isinstance(x, type) and issubclass(x, AggregationRule)}
    assert {type(make()) for make, _ in RULES.values()} == exported - {AggregationRule}


def sent_in(data, way, round):
    """Every client's upload in a form of its own choice; of lists, in one for all."""
    one_for_all = way is WAYS["lists"]
    K = 1 if one_for_all else len(round.uploads)
    forms = data.draw(st.lists(st.sampled_from(way.forms), min_size=K, max_size=K), "forms")
    fishers = data.draw(st.lists(st.sampled_from(way.fishers), min_size=K, max_size=K), "Fishers")
    if one_for_all:
        forms, fishers = forms * len(round.uploads), fishers * len(round.uploads)
    sent = [way.send(round, *each) for each in zip(round.uploads, forms, fishers, strict=True)]
    return sent, forms


# --- right calls


@given(given=rules_and_rounds(AVERAGES))
def test_the_mean_of_kept_updates_by_their_weights(given):
    make, round = given
    rule = make()
    result = round.aggregate(rule)
    fishers = torch.stack([upload.fisher for upload in round.uploads]).double()
    low, high = fishers.amin(1, keepdim=True), fishers.amax(1, keepdim=True)
    factors = 2 * torch.sigmoid((fishers - low) / (high - low)) if rule.rescale else torch.ones(())
    updates = torch.stack([upload.update for upload in round.uploads]).double()
    expected = round.w.double() + result.weights @ (factors * updates)
    torch.testing.assert_close(result.params.double(), expected, rtol=1e-6, atol=1e-6)
    assert not result.rejected
    assert result.kept_clients == [c for c, kept in zip(result.clients, result.kept, strict=True) if kept]


def buffer_of(rule, result, sent, values):
    """The weighted mean of kept clients' values, held between the quartiles (or what else the rule says)."""
    rows = [row for row, kept in enumerate(result.kept.tolist()) if kept]
    if not rows:
        return sent.double()
    weights = result.weights[rows] / result.weights[rows].sum()
    values = torch.stack([values[row].double() for row in rows])
    mean = torch.tensordot(weights, values, 1)
    trim = rule.buffer_trim(len(rows))
    if trim is None:
        return mean
    ordered = values.sort(0).values
    return mean.clamp(ordered[trim], ordered[-1 - trim])


@given(given=rules_and_rounds(), data=st.data())
def test_every_way_in_gives_the_same(given, data, tmp_path_factory):
    way = WAYS[data.draw(st.sampled_from(sorted(WAYS)), "way")]
    make, round = given
    expected = round.aggregate(make())
    sent, forms = sent_in(data, way, round)
    before = bits([vars(s) for s in sent]), bits(round.model)
    rule = make()
    outcome = way.aggregate(round, rule, sent, tmp_path_factory.getbasetemp())
    assert (bits([vars(s) for s in sent]), bits(round.model)) == before
    assert list(outcome.result.clients) == [plain(upload.client) for upload in round.uploads]
    assert outcome.result.rejected == {}
    assert_same_result(outcome.result, expected)
    torch.testing.assert_close(outcome.params, expected.params, rtol=2e-6, atol=2e-6)
    if outcome.state is None:
        return
    state = round.model.state_dict()
    assert list(outcome.state) == list(state)
    for one, other in round.layout.tied:
        assert torch.equal(outcome.state[one], outcome.state[other])
    for buffer in round.buffers:
        values = [
            upload.buffers[buffer] if carries_buffers(way, form) else state[buffer]
            for upload, form in zip(round.uploads, forms, strict=True)
        ]
        mean, found = buffer_of(rule, outcome.result, state[buffer], values), outcome.state[buffer]
        assert found.dtype == state[buffer].dtype
        rounding = 0 if found.is_floating_point() else 0.5
        torch.testing.assert_close(found.double(), mean, rtol=1e-6, atol=1e-6 + rounding)


@given(given=rules_and_rounds(), data=st.data())
def test_matrices_of_any_kind_give_the_same(given, data):
    make, round = given
    arguments = round.arguments()
    expected = make().aggregate(**arguments)
    kinds = {
        "transposed": lambda x: x.t().contiguous().t(),
        "float64": lambda x: x.double(),
        "array": lambda x: x.numpy(),
        "array in another order": lambda x: np.asfortranarray(x.numpy()),
    }
    for name in ("updates", "fishers"):
        arguments[name] = kinds[data.draw(st.sampled_from(sorted(kinds)), name)](arguments[name])
    counts = data.draw(st.sampled_from([tuple, np.array, torch.tensor, lambda n: np.array(n, dtype=float)[:, None]]))
    arguments["num_samples"] = counts(arguments["num_samples"])
    before = bits(arguments)
    rule = make()
    result = rule.aggregate(**arguments)
    assert bits(arguments) == before
    assert_same_result(result, expected)
    if not rule.needs_fishers:
        assert_same_result(make().aggregate(**{**arguments, "fishers": None}), expected)
    if not rule.weighs_samples:
        assert_same_result(make().aggregate(**{**arguments, "num_samples": None}), expected)


# --- uploads that cannot be used


def numbers(field, index, value):
    def spoil(upload):
        changed = getattr(upload, field).clone()
        changed[index] = value
        return dataclasses.replace(upload, **{field: changed})

    return spoil


# What the numbers of an upload can be, and what the reason says.
BAD_NUMBERS = {
    "NaN in the update": (numbers("update", 5, math.nan), "not finite"),
    "an infinite update": (numbers("update", 0, -math.inf), "not finite"),
    "an update of NaN": (numbers("update", slice(None), math.nan), "not finite"),
    "NaN in the Fisher": (numbers("fisher", -1, math.nan), "Fisher is not finite"),
    "an infinite Fisher": (numbers("fisher", 0, math.inf), "Fisher is not finite"),
    "a negative Fisher": (numbers("fisher", 3, -0.5), "Fisher has negative entries.*-0.5"),
    **{
        f"a sample count of {count}": (lambda u, count=count: dataclasses.replace(u, count=count), "sample count")
        for count in (0, -3, math.nan, math.inf, -math.inf)
    },
}
# What else can be in the place of a vector or a mapping.
NONSENSE = {
    "nothing": lambda x, name: None,
    "a number": lambda x, name: 3.0,
    "text": lambda x, name: "state.pt",
    "an empty mapping": lambda x, name: {},
    "an empty sequence": lambda x, name: [],
    "a function": lambda x, name: len,
}
BAD_VECTORS = {
    "one parameter less": lambda x, name: x[:-1],
    "one parameter more": lambda x, name: torch.cat([x, x[:1]]),
    "a row": lambda x, name: x[None],
    "integers": lambda x, name: x.long(),
    "booleans": lambda x, name: x > 0,
    "complex numbers": lambda x, name: x.to(torch.complex64),
    "objects": lambda x, name: np.array([None] * len(x)),
    "words": lambda x, name: np.array(["1.0"] * len(x)),
    "on no device": lambda x, name: x.to("meta"),
    "sparse": lambda x, name: x.to_sparse(),
}
BAD_ENTRIES = {
    "a missing entry": lambda x, name: {key: value for key, value in x.items() if key != name},
    "a longer entry": lambda x, name: {**x, name: torch.cat([x[name], x[name]])},
    "a transposed entry": lambda x, name: {**x, name: x[name].reshape(1, *x[name].shape[::-1])},
    "an entry of integers": lambda x, name: {**x, name: torch.ones_like(x[name], dtype=torch.int64)},
    "an entry of complex numbers": lambda x, name: {**x, name: x[name].to(torch.complex64)},
    "an entry that is no tensor": lambda x, name: {**x, name: "0.5"},
    "an entry that is None": lambda x, name: {**x, name: None},
    "an entry of NaN": lambda x, name: {**x, name: torch.full_like(x[name], math.nan)},
    "another name": lambda x, name: {f"{key}_" if key == name else key: value for key, value in x.items()},
}


@st.composite
def spoilt(draw, way, rule, round, upload):
    """An upload as sent, with something wrong in it, and a pattern that the reason must have."""
    fields = ["model", *(["fisher"] if rule.needs_fishers else [])]
    if draw(st.booleans(), "bad numbers"):
        names = [
            name
            for name in BAD_NUMBERS
            if not ("Fisher" in name and not rule.needs_fishers)
            if not ("count" in name and not rule.weighs_samples and way is WAYS["lists"])
        ]
        spoil, reason = BAD_NUMBERS[draw(st.sampled_from(names), "wrong")]
        upload = spoil(upload)
        return way.send(round, upload, draw(st.sampled_from(way.forms)), draw(st.sampled_from(way.fishers))), reason
    field = draw(st.sampled_from(fields), "field")
    forms = way.forms if field == "model" else way.fishers
    tables = {"mapping": BAD_ENTRIES, "tensor": BAD_VECTORS, None: NONSENSE}
    form = draw(st.sampled_from([form for form in tables if form is None or form in forms]), "form")
    wrong = draw(st.sampled_from(sorted(tables[form])), "wrong")
    chosen = {"model": way.forms[0], "fisher": way.fishers[0]}
    chosen[field] = form or chosen[field]
    sent = way.send(round, upload, chosen["model"], chosen["fisher"])
    entry = draw(st.sampled_from(round.layout.names), "entry")
    spoilt = dataclasses.replace(sent, **{field: tables[form][wrong](getattr(sent, field), entry)})
    what = "Fisher" if field == "fisher" else "update|state|missing|parameters"
    return spoilt, f"{re.escape(entry)}|not finite" if form == "mapping" else what


@given(given=rules_and_rounds(spare=1), data=st.data())
def test_a_bad_upload_rejects_its_client_by_name(given, data, tmp_path_factory):
    make, round = given
    way = WAYS[data.draw(st.sampled_from(sorted(WAYS)), "way")]
    sent, _ = sent_in(data, way, round)
    row = data.draw(st.integers(0, len(sent) - 1), "row")
    rule = make()
    sent[row], reason = data.draw(spoilt(way, rule, round, round.uploads[row]))
    before = bits([vars(s) for s in sent]), bits(round.model)
    folder = tmp_path_factory.getbasetemp()
    victim = plain(sent[row].client)
    expected = way.aggregate(round, make(), [s for k, s in enumerate(sent) if k != row], folder)
    outcome = way.aggregate(round, rule, sent, folder)
    assert (bits([vars(s) for s in sent]), bits(round.model)) == before
    assert list(outcome.result.rejected) == [victim]
    assert re.search(reason, outcome.result.rejected[victim]), outcome.result.rejected[victim]
    assert_same_result(outcome.result, expected.result, [victim])
    for name, value in (expected.state or {}).items():
        torch.testing.assert_close(outcome.state[name], value, rtol=2e-6, atol=2e-6)
    remembered = getattr(rule, "state", None)
    assert remembered is None or victim not in remembered.clients
    if way is WAYS["UpdateStore in a file"]:
        return  # what was rejected before it was opened again is not written down
    strict = make()
    with pytest.raises(ValueError, match=re.escape(str(victim))):
        way.aggregate(round, strict, sent, folder, on_invalid="raise")
    assert strict.memory() == make().memory()
