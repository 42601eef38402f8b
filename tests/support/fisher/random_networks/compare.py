"""The Fisher of a random network against plain autograd, one sample at a time; what is left behind afterwards."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fdcr_fast import diagonal_fisher
from tests.support.fisher.one_by_one import exact_batch_norm

from .compose import Network

EXACT = 1e-7  # of an entry,
FLOOR = 1e-12  # and of the largest: numbers of which rounding leaves nothing,
ROUNDED = 1e-30  # as it does of the square of a sum of terms of about one that cancel
UNNAMED = "no error, though nothing depends on "


@dataclass
class Verdict:
    """``same``; ``refused`` with a clear error; ``different``, ``crash``, ``changed``; ``invalid``: not our fault."""

    kind: str
    text: str = ""

    @property
    def failed(self) -> bool:
        return self.kind in ("different", "crash", "changed")


def named_loss(name: str, options: dict[str, Any]) -> Any:
    """A loss by name, summed over whatever a sample has."""

    def cross_entropy(o: Tensor, t: Tensor) -> Tensor:
        o = o.transpose(1, 2) if o.dim() == 3 and not t.is_floating_point() else o
        return F.cross_entropy(o, t, reduction="none", **options)

    def bce_with_logits(o: Tensor, t: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(o, t, reduction="none", **options)

    def mse(o: Tensor, t: Tensor) -> Tensor:
        return (o - t.view_as(o)).square()

    chosen = {"cross_entropy": cross_entropy, "bce_with_logits": bce_with_logits, "mse": mse}[name]
    return lambda o, t: chosen(o, t).reshape(len(o), -1).sum(1)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"] if isinstance(output, dict) else output.logits


def expectation(name: str, o: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of the kind "exact": weights, and what is differentiated and squared for each."""
    o = o[0].flatten()
    d = o.detach()
    if name == "cross_entropy":
        return list(zip(d.softmax(0), o.log_softmax(0), strict=True))
    variance = d.sigmoid() * (1 - d.sigmoid()) if name == "bce_with_logits" else torch.full_like(d, 2.0)
    return list(zip(variance, o, strict=True))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Transformer layers as under autograd, also where a reentrant checkpoint calls them without: hooks are heard."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class Reference:
    """Squares of gradients by parameter; None where no sample's loss depends on it."""

    def __init__(self, network: Network, kind: str | None = None) -> None:
        self.network = network
        self.model = copy.deepcopy(network.model)
        if state := network.options.get("state"):
            self.model.load_state_dict(state, strict=False)
        self.model.eval().requires_grad_(True)
        self.inputs, self.targets = tree_map(torch.clone, (network.inputs, network.targets))
        self.parameters = dict(self.model.named_parameters())
        self.totals: dict[str, Tensor | None] = dict.fromkeys(self.parameters)
        self.kind = kind or network.options.get("kind", "empirical")
        loss = network.loss
        self.by_name = isinstance(loss, str)
        self.loss = named_loss(loss, network.options.get("loss_options", {})) if self.by_name else loss

    def forward(self, where: slice) -> tuple[nn.Module, Any, Tensor]:
        """From the state that every forward pass starts with."""
        model = copy.deepcopy(self.model) if self.network.leaves_traces else self.model
        inputs, targets = tree_map(lambda x: x[where].clone(), (self.inputs, self.targets))
        output = (
            model(**inputs)
            if isinstance(inputs, dict)
            else model(*inputs)
            if isinstance(inputs, tuple)
            else model(inputs)
        )
        return model, output, targets

    def add(self, model: nn.Module, loss: Tensor, weight: Any) -> None:
        if loss.requires_grad:
            loss.backward()  # not grad(): reentrant checkpoints refuse it
        for name, p in self.parameters.items() if model is self.model else model.named_parameters():
            if p.grad is not None:
                square = weight * p.grad.to_dense().square()
                total = self.totals[name]
                self.totals[name] = square if total is None else total + square
                p.grad = None

    @exact_batch_norm
    @without_fast_path()
    def run(self) -> dict[str, Tensor | None]:
        n = self.network.samples
        if self.kind == "squared_batch_gradient":
            batches = self.network.batches()
            for where in batches:
                model, output, targets = self.forward(where)
                loss = self.loss(logits(output) if self.by_name else output, targets).mean()
                self.add(model, loss, 1 / len(batches))
        for i in range(n if self.kind != "squared_batch_gradient" else 0):
            model, output, targets = self.forward(slice(i, i + 1))
            if self.kind == "empirical":
                self.add(model, self.loss(logits(output) if self.by_name else output, targets).sum(), 1 / n)
                continue
            for k in range(len(expectation(self.network.loss, logits(output)))):
                if k:
                    model, output, _ = self.forward(slice(i, i + 1))
                weight, score = expectation(self.network.loss, logits(output))[k]
                self.add(model, score, weight / n)
        return self.totals


@exact_batch_norm
@without_fast_path()
def in_its_batch(network: Network) -> dict[str, Tensor | None]:
    """The same, with the gradient of each sample's loss through the batch as a whole."""
    reference = Reference(network)
    for i in range(network.samples):
        model, output, targets = reference.forward(slice(None))
        loss = reference.loss(logits(output) if reference.by_name else output, targets)
        reference.add(model, loss[i], 1 / network.samples)
    return reference.totals


def differences(got: dict[str, Tensor], want: dict[str, Tensor | None]) -> list[str]:
    largest = max((x.max().item() for x in want.values() if x is not None), default=0.0)
    found = []
    for name, x in got.items():
        y = want[name] if want[name] is not None else torch.zeros_like(x)
        if not ((x - y).abs() <= EXACT * y + max(FLOOR * largest, ROUNDED)).all():
            share = (x.sum() / y.sum()).item()
            found.append(f"{name}: {share:.6g} of the sum expected")
    return found


class Content(tuple[Any, ...]):
    """Of a dictionary or list: its entries, which are compared by identity."""

    __slots__ = ()


def attributes(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Everything that modules hold; of torch's own tables and lists, their content."""
    found: dict[tuple[str, str], Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if key.startswith("_flat_weight"):  # a recurrent layer looks whether they are still its weights
                continue
            if key.startswith("_") and isinstance(value, dict | list):
                value = Content(value.items() if isinstance(value, dict) else enumerate(value))
            found[name, key] = value
    return found


def same(a: Any, b: Any) -> bool:
    if not isinstance(a, Content) or not isinstance(b, Content) or len(a) != len(b):
        return a is b
    return all(k == q and v is w for (k, v), (q, w) in zip(a, b, strict=True))


def values(network: Network) -> list[Tensor]:
    state = network.options.get("state") or {}
    named = [*network.model.named_parameters(), *network.model.named_buffers()]
    leaves = tree_leaves((network.inputs, network.targets))
    return [*(x for _, x in named), *state.values(), *leaves]


def _equal(a: Tensor, b: Tensor) -> bool:
    return not torch._C._functorch.is_functorch_wrapped_tensor(a) and torch.equal(a, b)  # else vmap left it behind


def traces(network: Network, before: tuple[Any, ...]) -> list[str]:
    """What is not as it was."""
    held, copies, flags, grads, random = before
    after = attributes(network.model)
    other = [key for key in held.keys() | after.keys() if not same(held.get(key, held), after.get(key, after))]
    found = [f"attribute {'.'.join(filter(None, key))}" for key in other]
    now = values(network)
    if len(now) != len(copies) or not all(map(_equal, now, copies)):
        found.append("values of parameters, buffers, state, inputs or targets")
    if [p.requires_grad for p in network.model.parameters()] != flags:
        found.append("requires_grad")
    if any(p.grad is not None for p in network.model.parameters()) or grads:
        found.append(".grad")
    if not torch.equal(torch.get_rng_state(), random):
        found.append("the global generator")
    return found


def check(network: Network) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want = Reference(network).run()
        except Exception as error:
            return Verdict("invalid", _shown(error))
        if not all(x is None or (x.isfinite().all() and x.max() < 1e30) for x in want.values()):
            return Verdict("invalid", "not finite")
        grads = any(p.grad is not None for p in network.model.parameters())
        flags = [p.requires_grad for p in network.model.parameters()]
        copies = [x.detach().clone() for x in values(network)]
        before = attributes(network.model), copies, flags, grads, torch.get_rng_state()
        verdict = _compared(network, want)
        found = traces(network, before)
        if found and verdict.kind in ("same", "refused"):
            return Verdict("changed", "; ".join(sorted(found)))
        if verdict.kind in ("different", "crash"):
            return _doubted(verdict, network.again(), want) or verdict
        if network.leaves_something:
            try:
                Reference(network).forward(slice(None))  # a copy of the model as it is now
            except Exception as error:
                return Verdict("changed", f"the model cannot be copied or run: {_shown(error)}")
        return verdict


def _compared(network: Network, want: dict[str, Tensor | None]) -> Verdict:
    chosen = network.options.get("params")
    names = [name for name in want if chosen is None or name in chosen]
    unused = [name for name in names if want[name] is None]
    options = dict(network.options)
    while True:
        try:
            fisher = diagonal_fisher(network.model, network.data, network.loss, **options)
            break
        except ValueError as error:
            named = {word.strip(".") for word in re.findall(r"[\w.]+", str(error))} & set(names)
            do_depend = [name for name in named if want[name] is not None and want[name].any()]
            if do_depend and "not depend" in str(error):
                return Verdict("different", f"said not to depend on {', '.join(do_depend)}")
            if not named or do_depend:
                return Verdict("refused", _shown(error))
            names = [name for name in names if name not in named and name not in unused]
            if not names:
                return Verdict("same")
            options["params"] = names  # as the error says
        except Exception as error:
            return Verdict("crash", _shown(error))
    if fisher.dtype != torch.float64:
        return Verdict("different", f"{fisher.dtype} of a float64 model")
    parameters = dict(network.model.named_parameters())
    parts = fisher.split([parameters[name].numel() for name in names])
    got = {name: x.view(parameters[name].shape) for name, x in zip(names, parts, strict=True)}
    found = differences(got, want)
    if not found and (left := [name for name in unused if name in got]):
        found = [UNNAMED + ", ".join(left)]
    return Verdict("different", "; ".join(found)) if found else Verdict("same")


def _doubted(verdict: Verdict, network: Network, want: dict[str, Tensor | None]) -> Verdict | None:
    """Whether plain autograd gives other numbers, too: in the batch, or after a change in the last digits."""
    if verdict.text.startswith(UNNAMED):
        batched, left = in_its_batch(network), verdict.text.removeprefix(UNNAMED).split(", ")
        # Zero, as returned: in a batch, the rows of others keep them in the graph.
        return None if any(batched[name] is None for name in left) else Verdict("same")
    for word, other in (("in its batch", _batched), ("by other last digits", _shaken)):
        try:
            numbers = other(network)
            alone = Reference(network, "empirical").run() if other is _batched else want
        except Exception as error:
            return Verdict("invalid", f"{word}: {_shown(error)}")
        if numbers is not None and differences({k: x for k, x in numbers.items() if x is not None}, alone):
            return Verdict("invalid", f"plain autograd differs {word}")
    return None


def _batched(network: Network) -> dict[str, Tensor | None] | None:
    return in_its_batch(network) if "scale_grad_by_freq" not in network.code else None


def _shaken(network: Network) -> dict[str, Tensor | None]:
    reference = Reference(network)
    with torch.no_grad():
        for p in reference.model.parameters():
            p.mul_(1 + 1e-13 * torch.randn_like(p))
    return reference.run()


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
