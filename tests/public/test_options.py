"""Options of every rule: a value that the documentation has not makes no rule, and the message names the option."""

from __future__ import annotations

import inspect
import math
import re

import numpy as np
import pytest

import fdcr_fast
from fdcr_fast import AggregationRule

RULES = sorted(
    name
    for name in fdcr_fast.__all__
    if inspect.isclass(rule := getattr(fdcr_fast, name)) and issubclass(rule, AggregationRule)
    if rule is not AggregationRule
)
NEEDED = {
    "num_byzantine": 1,
    "threshold": 3,
    "server_update": lambda w: w,
    "refine": lambda w: w,
    "evaluate": lambda w: fdcr_fast.ModelQuality(0.0, 0.0),
}
WRONG = {
    "float": (math.nan, -math.inf, -1.5, "1", [1.0], True),
    "int": (math.nan, "1", 1.5j, True),
    "bool": ("no", 2, None),
    "str": ("text", 1.5, []),
    "Callable": ("text", None),
    "State": ({}, None),
    "ParamGroups": ("layers", 3),
    "slice": (3, -1.5, None),
}
OPTIONS = [
    (name, option, value)
    for name in RULES
    for option, parameter in inspect.signature(getattr(fdcr_fast, name)).parameters.items()
    for kind, values in WRONG.items()
    if re.search(rf"{kind}\b", parameter.annotation)
    for value in values
]


def made(name, **options):
    rule = getattr(fdcr_fast, name)
    given = {option: NEEDED[option] for option in inspect.signature(rule).parameters if option in NEEDED}
    return rule(**{**given, **options})


@pytest.mark.parametrize(("name", "option", "value"), OPTIONS)
def test_a_value_that_no_option_has(name, option, value):
    with pytest.raises((TypeError, ValueError), match=option):
        made(name, **{option: value})


@pytest.mark.parametrize("name", RULES)
def test_numbers_of_numpy(name):
    numbers = {
        option: np.float64(parameter.default) if isinstance(parameter.default, float) else np.int64(parameter.default)
        for option, parameter in inspect.signature(getattr(fdcr_fast, name)).parameters.items()
        if type(parameter.default) in (int, float)
    }
    assert made(name, **numbers) == made(name)
