"""The diagonal Fisher information of a model on data: one client's, or those of many clients in one call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fdcr_fast.fisher.check import Check
from fdcr_fast.fisher.data import batches
from fdcr_fast.fisher.estimate import Estimate
from fdcr_fast.fisher.kinds import BATCH_GRADIENT, resolve_kind
from fdcr_fast.fisher.losses import Loss, resolve_loss
from fdcr_fast.fisher.model.inventory import Inventory, listed, selected, unwrapped, values_of
from fdcr_fast.fisher.model.modes import evaluation, one_thread_at_a_time
from fdcr_fast.fisher.model.settings import settings_of
from fdcr_fast.fisher.model.stateless import Stateless
from fdcr_fast.fisher.per_sample import PerSampleGradients
from fdcr_fast.layout import as_tensor


def diagonal_fisher(
    model: nn.Module,
    data: Any,
    loss: str | Loss = "cross_entropy",
    *,
    kind: str = "empirical",
    loss_options: Mapping[str, Any] | None = None,
    weigh_batches: bool = False,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    state: Mapping[str, Tensor] | None = None,
    params: Iterable[str] | None = None,
    batch_size: int | None = None,
    max_batches: int | None = None,
    eval_mode: bool = True,
    check: str = "first",
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Diagonal Fisher information (paper eq. 5), squared per sample before the mean.

    ``F = 1/N sum_n (grad_w l(f_w(x_n), y_n))^2`` with ``l = -log p(y | x)`` for the default loss, exact for any model
    that treats the samples of a batch independently of each other. Linear, convolution, embedding, norm and recurrent
    layers go through the library's own kernels, which need no memory for per-sample gradients, and so do parameters
    outside of layers that enter the computation as terms or factors; whatever else there is goes through ``vmap(grad)``
    in chunks, or one sample at a time. The autograd graph of each batch decides which way is taken (docs/fisher.md).

    Model and data are afterwards what they were before, whatever forward passes write to: parameters, buffers,
    attributes, inputs, ``.grad``, ``requires_grad``, modes, hooks. Every pass begins with what the model has now.
    Parameters that are frozen for training have a Fisher like all others: choose with ``params``. Works under
    ``torch.autocast``, inside ``torch.no_grad`` and ``torch.inference_mode``; compiled models are run eagerly, and
    ``nn.DataParallel`` is unwrapped.

    Args:
        model: Any module that treats the samples of a batch independently of each other, but for TorchScript.
        data: ``(inputs, targets)``, an iterable of such batches (a ``DataLoader``), or a data set of pairs
            ``(input, target)`` or of mappings. ``inputs`` is a tensor, a tuple of positional arguments or a mapping of
            keyword arguments. Tensors and NumPy arrays have the samples in dimension 0, and so have lists of text or
            numbers that are as long; tensors without dimensions, flags, ``None``, tuples of numbers and the like go
            with all samples. A batch may also be one mapping whose ``labels`` are the targets and whose other entries
            are the inputs.
        loss: ``cross_entropy``, ``nll``, ``mse``, ``bce_with_logits`` of the model's output, or of its ``logits``; or a
            callable ``(output, targets) -> [N]`` of per-sample losses. Classes are the dimension that the targets lack:
            dimension 1, or the last one as in models of language.
        kind: Which labels ``y`` are. ``"empirical"``: those of the data, as in the paper. ``"sampled"``: drawn from
            the model's own distribution; the mean over ``num_samples`` of them. ``"exact"``: the expectation over that
            distribution, at a backward pass per class (``cross_entropy`` and ``nll`` of outputs ``[N, C]``) or per
            output (``bce_with_logits``, and ``mse`` with its normal distribution of variance 1/2).
            ``"squared_batch_gradient"`` is not a Fisher: the mean over batches of the squared gradient of the batch's
            mean loss. It depends on the batch size and is found in re-implementations; it is here to reproduce them.
        weigh_batches: For that kind: batches b count by their samples, ``sum_b |b| g_b^2 / N``, as in the published
            experiments, instead of alike.
        loss_options: Options of a loss by name. ``per_sample="sum"`` or ``"mean"``: how the values of a sample, such as
            those of its tokens, become its loss, by default their sum; the mean is over those not ignored. As in
            ``torch.nn.functional``: ``weight`` (per class), ``ignore_index`` and, of ``cross_entropy``,
            ``label_smoothing``; ``weight`` and ``pos_weight`` of ``bce_with_logits``. Of classes also ``class_dim``,
            and ``shift=1`` for outputs about the next token where the targets are the tokens themselves. Losses are
            weighted, not divided by the sum of weights. Ignored labels have loss 0 and are ignored in every kind; a
            sample of nothing else counts in ``N``.
        num_samples: Draws per label of the kind ``"sampled"``.
        generator: The generator that the kind ``"sampled"`` draws from; by default the global one.
        state: Parameters and buffers by name to take instead of the model's own, such as a client's ``state_dict()``,
            tensors or arrays; what is missing is the model's own, running statistics of BatchNorm too. Prefixes of
            wrappers (``module.``, ``_orig_mod.``) may be there or not, here and in ``params``.
        params: Names of the parameters wanted, by default all of ``model.named_parameters()``.
        batch_size: Samples of one forward pass; larger batches are cut. By default what suits the device, but the
            batches as they come for ``"squared_batch_gradient"``.
        max_batches: Batches of ``data`` that are used, as they come, for loaders without an end; by default all.
        eval_mode: Evaluate the model in eval mode and restore its modes afterwards, also after an error. With False
            the modules keep their modes, and dropout draws its masks from the global generator.
        check: ``"first"``: two samples of the first batch, chosen by a generator of fixed seed, are compared with plain
            autograd, unless a model and a batch alike have passed before in this process; it costs as much as that
            batch. ``"all"``: two of every batch, which doubles the time. ``"off"``: none. Parameters that differ are
            computed one sample at a time, with a warning.
        progress: A function called after every forward pass's batch with the number of samples done so far.

    Returns:
        ``[P]``, the chosen parameters flattened one after the other in the order of ``named_parameters()``, on the
        model's device; float32, or float64 for a float64 model.

    Raises:
        ValueError: No samples; unknown loss, kind, check, option, parameter or entry of ``state``; outputs and targets
            whose shapes do not fit; parameters that no sample's loss depends on, that are not real numbers or have no
            values; layers that couple the samples of a batch (batch normalisation with batch statistics).
        TypeError: No ``torch.nn.Module``, or one of TorchScript.
        RuntimeError: With ``check="all"``, a later batch differs from plain autograd.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be positive, got {max_batches}")
    if weigh_batches and kind != BATCH_GRADIENT:
        raise ValueError(f"weigh_batches is for kind={BATCH_GRADIENT!r}, got kind={kind!r}")
    resolved = resolve_loss(loss, {} if loss_options is None else loss_options)
    labels = resolve_kind(kind, resolved, num_samples, generator)
    model = unwrapped(model)
    with one_thread_at_a_time(model):
        inventory = Inventory(model)
        names = selected(inventory, params)
        with evaluation(inventory, eval_mode), Stateless(inventory, values_of(inventory, state)) as stateless:
            fallback = PerSampleGradients(stateless)
            estimate = Estimate(stateless, names, labels, fallback)
            settings = inventory.settings, settings_of((kind, loss, loss_options))
            compare = Check(check, stateless, names, labels, fallback, settings, generator)
            whole = kind == BATCH_GRADIENT  # what a batch is matters
            most = sys.maxsize if whole and batch_size is None else batch_size
            for batch in batches(data, most or estimate.batch_size, max_batches):
                if whole:
                    estimate.add_batch_gradient(batch, batch.samples if weigh_batches else 1)
                else:
                    compare(estimate, batch)
                    estimate.add(batch)
                if progress is not None:
                    progress(estimate.samples)
            return estimate.mean()


def diagonal_fisher_stacked(
    model: nn.Module,
    state: Mapping[str, Any],
    data: Sequence[Any],
    loss: str | Loss = "cross_entropy",
    *,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Tensor:
    """Diagonal Fishers of many clients with the same architecture, each with its own parameters and data.

    Row ``k`` is :func:`diagonal_fisher` at client ``k``'s parameters on client ``k``'s data.

    Args:
        model: The architecture; its own values stand in for what ``state`` does not hold.
        state: ``[K, *shape]`` by name: the clients' parameters, and buffers if these differ, stacked as by
            ``torch.func.stack_module_state`` (which returns the two apart: ``{**params, **buffers}``).
        data: Each client's data, in any form that :func:`diagonal_fisher` takes.
        loss: The loss as in :func:`diagonal_fisher`, which also explains the ``options``.
        progress: A function called after every client with the number of clients done so far.

    Returns:
        ``[K, P]``: ready for ``FDCR().aggregate``.

    Raises:
        ValueError: No clients, numbers of clients differ, or anything that :func:`diagonal_fisher` raises, with the
            client's number.
    """
    state = {name: as_tensor(x) for name, x in state.items()}
    if options.get("params") is not None:
        options["params"] = listed(options["params"])  # an iterator would serve the first client only
    sizes = {name: len(x) if x.dim() > 0 else 0 for name, x in state.items()}
    if set(sizes.values()) != {len(data)} or not data:
        raise ValueError(f"expected state [K, ...] and data of the same K >= 1 clients, got {sizes} and {len(data)}")
    rows: Tensor | None = None
    for k, client_data in enumerate(data):
        try:
            row = diagonal_fisher(model, client_data, loss, state={name: x[k] for name, x in state.items()}, **options)
        except ValueError as error:
            raise ValueError(f"client {k}: {error}") from error
        rows = row.new_empty(len(data), len(row)) if rows is None else rows
        rows[k] = row
        if progress is not None:
            progress(k + 1)
    assert rows is not None
    return rows
