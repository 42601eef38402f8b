"""Random networks in small numbers; ``fuzz_networks.py`` runs as many as wanted."""

import random
import re
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fdcr_fast import diagonal_fisher
from tests.support.fisher.random_networks import check, compare, compose
from tests.support.fisher.random_networks.draft import BLOCKS

REFUSALS: list[str] = []  # messages of the errors that the documentation announces, as regular expressions


@settings(max_examples=5 * settings().max_examples, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_fisher_is_that_of_plain_autograd(chance):
    with compose(chance) as network:
        verdict = check(network)
    known = verdict.kind == "refused" and any(re.search(message, verdict.text) for message in REFUSALS)
    if not known and verdict.kind not in ("same", "invalid"):
        raise AssertionError(f"{verdict.kind}: {verdict.text}\n{network.script}")


def test_networks_can_be_trained_and_have_every_block():
    seen: Counter[str] = Counter()
    invalid = []
    for seed in range(600):
        with compose(random.Random(seed)) as network:
            seen.update(network.seen)
            if seed < 150:
                try:
                    compare.Reference(network).run()
                except RuntimeError as error:
                    invalid.append(error)
    assert {build.__name__ for _, build in BLOCKS} <= seen.keys()
    assert len(invalid) < 3, invalid


class Plainest:
    def randrange(self, stop):
        return 0


# What the comparison must find: each of these does one thing wrong.


def spoilt(network, *args, **options):
    return diagonal_fisher(*args, **options) * (1 + 1e-6)


def zero(network, *args, **options):
    return torch.zeros_like(diagonal_fisher(*args, **options))


def in_float32(network, *args, **options):
    return diagonal_fisher(*args, **options).float()


def fails(network, *args, **options):
    raise IndexError


def refuses(network, *args, **options):
    raise ValueError("this is not supported")


def denies(network, *args, **options):
    raise ValueError("the losses do not depend on l0.bias")


def changes(what):
    def call(network, *args, **options):
        fisher = diagonal_fisher(*args, **options)
        what(network)
        return fisher

    return call


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda network, *args, **options: diagonal_fisher(*args, **options), "same", ""),
        (spoilt, "different", "l0.weight: 1 of the sum"),
        (zero, "different", "l0.weight: 0 of the sum expected; l0.bias: 0 of the sum"),
        (in_float32, "different", "torch.float32 of a float64 model"),
        (fails, "crash", "IndexError"),
        (refuses, "refused", "this is not supported"),
        (denies, "different", "said not to depend on l0.bias"),
        (changes(lambda n: setattr(n.model, "seen", 1)), "changed", "attribute seen"),
        (changes(lambda n: n.model.l0.register_forward_hook(print)), "changed", "attribute l0._forward_hooks"),
        (changes(lambda n: n.model.l0.train()), "changed", "attribute l0.training"),
        (changes(lambda n: n.model.l0.requires_grad_(False)), "changed", "requires_grad"),
        (changes(lambda n: setattr(n.model.l0.bias, "grad", torch.zeros(2).double())), "changed", ".grad"),
        (changes(lambda n: setattr(n.model.l0, "bias", nn.Parameter(n.model.l0.bias))), "changed", "l0._parameters"),
        (changes(lambda n: n.model.l0.bias.detach().mul_(2)), "changed", "values"),
        (changes(lambda n: n.inputs.mul_(2)), "changed", "values"),
        (changes(lambda n: n.targets.add_(1)), "changed", "values"),
        (changes(lambda n: torch.rand(1)), "changed", "the global generator"),
    ],
)
def test_faults_are_found(monkeypatch, call, kind, text):
    network = compose(Plainest())
    monkeypatch.setattr(compare, "diagonal_fisher", lambda *args, **options: call(network, *args, **options))
    verdict = check(network)
    assert verdict.kind == kind
    assert text in verdict.text
