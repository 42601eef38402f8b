"""Models that people have, their data, and their Fisher by plain autograd, one sample at a time in float64."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fdcr_fast import diagonal_fisher, diagonal_fisher_stacked
from tests.support.fisher.one_by_one import exact_batch_norm

N = 4  # samples; sequences have as many tokens, or another number, on purpose
CLASSES = 5
DEAD = 1e-24  # of the largest entry: rounding errors of gradients that are mathematically zero, squared


@dataclass
class Case:
    model: nn.Module
    inputs: Any
    targets: Any
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy"  # "tokens" is cross_entropy of logits [N, T, C]
    training: bool = False
    recomputes: bool = False  # in the backward pass
    tolerance: float = 1e-9  # wider for models that compute in float32 whatever their parameters are
    dead: float = 0.2  # the share of parameters that may have no influence
    expected: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    expected_of_state: dict[str, Tensor] = field(default_factory=dict)
    before: list[Tensor] = field(default_factory=list)


def images(size=32, channels=3):
    return torch.randn(N, channels, size, size)


def classes():
    return torch.randint(0, CLASSES, (N,))


def tokens(length=6, vocabulary=20):
    return torch.randint(3, vocabulary, (N, length))


def padding(length=6):
    """True where a token is: all of them in the first row, two in the last one."""
    return torch.arange(length) < torch.linspace(length, 2, N).round()[:, None]


def sum_of_tokens(output, target):
    logits = output if isinstance(output, Tensor) else output.logits
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none").sum(1)


def sum_of_pixels(output, target):
    return F.cross_entropy(output, target, reduction="none").view(len(target), -1).sum(1)


def square(*names):
    """The sum of squares of an output's tensors, about random targets."""

    def loss(output, target):
        return sum((output[name].flatten(1) - target).square().mean(1) for name in names)

    return loss


def reference_loss(loss):
    if loss == "tokens":
        return sum_of_tokens
    if loss == "cross_entropy":
        return lambda output, target: sum_of_pixels(output if isinstance(output, Tensor) else output.logits, target)
    return loss


def randomised(model):
    """Zeros hide whatever stands before them, and ones a missing factor; small weights make all attention uniform."""
    with torch.no_grad():
        for p in model.parameters():
            if p.min() == p.max():
                p.add_(0.3 * torch.randn_like(p))
            elif p.dim() > 1 and p.std() < 0.3 * p[0].numel() ** -0.5:
                p.mul_(p[0].numel() ** -0.5 / p.std())
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(0, 0.3)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 2)
    return model


def perturbed(model):
    """A copy with other values, the shared ones still shared."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.5 * (p.std().item() if p.numel() > 1 else 0.5))
        for name, b in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b.mul_(torch.empty_like(b).uniform_(0.7, 1.4))
    return model


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def sample(tree, i):
    return tree_map(lambda x: x[i : i + 1].clone() if isinstance(x, Tensor) else x, tree)


def count_calls(model):
    calls = [0]
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@exact_batch_norm
def one_by_one(case, model):
    """The losses, and by name the Fisher of every parameter that at least one of them depends on."""
    model = copy.deepcopy(model).requires_grad_(True)
    parameters = dict(model.named_parameters())
    calls = count_calls(model) if case.recomputes else [0]
    loss = reference_loss(case.loss)
    losses, total = [], {}
    for i in range(N):
        losses.append(loss(call(model, sample(case.inputs, i)), sample(case.targets, i)))
        forward = calls[0]
        losses[-1].sum().backward(retain_graph=True)  # some models keep a part of the first sample's graph
        assert (calls[0] > forward) == case.recomputes
        for name, p in parameters.items():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad.to_dense().square() / N
                p.grad = None
    return torch.cat(losses).detach(), {name: total[name] for name in parameters if name in total}


@torch.no_grad()
def answer(model, inputs):
    """A copy's output, since some models keep a part of what they have computed."""
    return call(copy.deepcopy(model), inputs)


def assert_independent(case, losses):
    """Of each other, or there are no per-sample gradients."""
    together = reference_loss(case.loss)(answer(case.model, case.inputs), case.targets)
    torch.testing.assert_close(together, losses, rtol=case.tolerance, atol=0)


def assert_alive(case, losses):
    """A test of zeros shows nothing: only what cannot change the losses may have none but zeros."""
    largest = max(f.max() for f in case.expected.values())
    dead = [name for name, f in case.expected.items() if f.max() <= DEAD * largest]
    assert len(dead) <= case.dead * len(case.expected), f"most of the model is dead: {dead}"
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        for name in dead:
            model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)), alpha=0.1)
        after = reference_loss(case.loss)(call(model, case.inputs), case.targets)
    torch.testing.assert_close(after, losses, rtol=case.tolerance, atol=0, msg=f"not dead: {dead}")


def tensors(case):
    """What must stay as it is, and what the model makes of it."""
    output = answer(case.model, sample(case.inputs, 0))
    trees = case.model.state_dict(), case.inputs, case.targets, dict(output) if isinstance(output, dict) else output
    return [t for t in tree_leaves(trees) if isinstance(t, Tensor)]


def built(builder):
    torch.manual_seed(0)
    case = builder()
    torch.manual_seed(1)
    case.model = randomised(case.model).train(case.training).double()
    case.inputs, case.targets = tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, (case.inputs, case.targets)
    )
    other = perturbed(case.model)
    case.state = {name: t.clone() for name, t in other.state_dict().items()}
    losses, case.expected = one_by_one(case, case.model)
    _, case.expected_of_state = one_by_one(case, other)
    assert_independent(case, losses)
    assert_alive(case, losses)
    case.before = [t.clone() for t in tensors(case)]
    return case


def cases(table):
    """A fixture that builds the cases of a table (name -> builder) one after the other."""

    @pytest.fixture(scope="module", params=table)
    def case(request):
        return built(table[request.param])

    return case


def check(how):
    """The self-check, where there is one: off, what it would hide shows; all, it agrees with plain autograd."""
    return {"check": how} if "check" in inspect.signature(diagonal_fisher).parameters else {}


def assert_untouched(case):
    """The model keeps its values, can still be copied, and answers as before; the data are as they were."""
    after = tensors(case)
    assert len(after) == len(case.before)
    assert all(torch.equal(a, b) for a, b in zip(after, case.before, strict=True)), "changed values or answers"
    assert all(p.grad is None for p in case.model.parameters())


def arguments(case, expected):
    options = {"eval_mode": False} if case.training else {}
    # Only parameters that no loss depends on, such as an unused pooler's, have to be left out.
    names = [name for name, _ in case.model.named_parameters()]
    if set(names) != set(expected):
        options["params"] = list(expected)
    return "cross_entropy" if case.loss == "tokens" else case.loss, options


def assert_close(fisher, expected, tolerance, floor=1e-20):
    """Parameter by parameter: a small one must not hide behind a large one."""
    parts = fisher.double().split([f.numel() for f in expected.values()])
    largest = max(f.max() for f in expected.values())
    wrong = []
    for (name, want), got in zip(expected.items(), parts, strict=True):
        error = (got - want.flatten()).abs().max()
        if not error <= tolerance * want.max() + floor * largest:
            wrong.append(f"{name}: sum {got.sum():.6g}, expected {want.sum():.6g}, largest error {error:.2g}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(expected)} parameters", *wrong[:6]])


def flags(model):
    """The parameters must be the same objects, too: an optimizer holds them."""
    return [(id(p), p.requires_grad) for p in model.parameters()], [m.training for m in model.modules()]


def assert_fisher(case, expected, **options):
    loss, others = arguments(case, expected)
    before = flags(case.model)
    fisher = diagonal_fisher(case.model, (case.inputs, case.targets), loss, **others, **options)
    assert_close(fisher, expected, case.tolerance)
    assert flags(case.model) == before, "parameters or modes are not restored"


def own_values(case):
    assert_fisher(case, case.expected, **check("off"))
    assert_fisher(case, case.expected, batch_size=3)  # and a last batch of one


def other_values(case):
    assert_fisher(case, case.expected_of_state, state=case.state, **check("all"))


def stacked(case):
    """Two clients in one call; an expert that one of them does not use cannot be asked for."""
    both = case.expected.keys() & case.expected_of_state.keys()
    expected = [{name: f for name, f in e.items() if name in both} for e in (case.expected, case.expected_of_state)]
    loss, options = arguments(case, expected[0])
    own, before = case.model.state_dict(), flags(case.model)
    state = {name: torch.stack([own[name], t]) for name, t in case.state.items()}
    fishers = diagonal_fisher_stacked(case.model, state, [(case.inputs, case.targets)] * 2, loss, **options)
    for fisher, e in zip(fishers, expected, strict=True):
        assert_close(fisher, e, case.tolerance)
    assert flags(case.model) == before, "parameters or modes are not restored"


def frozen(case):
    """Only the last layer is trained, whose parameters, all or every third are asked for."""
    names = list(case.expected)
    head = names[-1].rpartition(".")[0]
    before = {name: p.requires_grad for name, p in case.model.named_parameters()}
    for name, p in case.model.named_parameters():
        p.requires_grad_(name.startswith(head))
    try:
        for chosen in [n for n in names if n.startswith(head)], names[::3], names:
            assert_fisher(case, {name: case.expected[name] for name in chosen})
    finally:
        for name, p in case.model.named_parameters():
            p.requires_grad_(before[name])


VARIANTS = {"own": own_values, "state": other_values, "stacked": stacked, "frozen": frozen}


def check_case(case, variant):
    VARIANTS[variant](case)
    assert_untouched(case)


def in_float32(case, tolerance=2e-3):
    """Against float64; only for smooth models, where rounding does not take the other side of a kink."""
    model = copy.deepcopy(case.model).float()
    inputs = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, case.inputs)
    loss, options = arguments(case, case.expected)
    fisher = diagonal_fisher(model, (inputs, case.targets), loss, **options)
    assert_close(fisher, case.expected, tolerance, 1e-9)
