"""What PyTorch gets wrong or cannot do (seen with 2.14, on a CPU), and what is done about it when a model is called."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from fdcr_fast.importance import hooks


@contextmanager
def evaluation() -> Iterator[None]:
    """Gradients on, whatever the caller's context, of what is called module by module.

    The graphs of ``torch.compile`` have no place in which to record layers. The fast path of ``nn.TransformerEncoder``
    goes over nested tensors, which have no gradients; it is taken where all its parameters are frozen.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), torch.enable_grad(), _uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _uncompiled() -> AbstractContextManager[Any]:
    """Without the compiler, which is slow to import, nothing can be compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def vectorisation(model: nn.Module) -> Iterator[None]:
    """For ``vmap(grad)`` of a model.

    Fused attention has no batching rule. oneDNN's recurrent layers give wrong bias gradients.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    onednn = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(onednn and not recurrent)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)


def refuse_conversion(*_: Any) -> None:
    """In place of ``nn.Module._apply``, which crashes the process where parameters are wrapped by ``vmap``."""
    raise RuntimeError("a module is converted in its forward pass")


def lay_out_gradients_of_batch_norms(modules: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Registers hooks for the gradients at the outputs of batch normalisations.

    In eval mode, where a dimension has size 1 and so fits both layouts of images, the gradient is wrong if it arrives
    in another layout than the input had, as from tokens made of images: it is brought into the input's.
    """
    norms = [module for module in modules if isinstance(module, _BatchNorm)]
    return [module.register_forward_hook(_lay_out_gradient, prepend=True, with_kwargs=True) for module in norms]


def _lay_out_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    input = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    if input is None or input.dim() < 3 or 1 not in (input.shape[0], *input.shape[2:]):
        return
    if not isinstance(output, Tensor) or not output.requires_grad or output.shape != input.shape:
        return
    empty = torch.empty_like(input, requires_grad=False)
    # Reentrant checkpoints may call it without a gradient.
    hooks.register(output, lambda grad: grad if grad is None or grad.stride() == empty.stride() else empty.copy_(grad))
