"""Workarounds for what PyTorch gets wrong or cannot do when a model is called (seen with 2.14, on a CPU)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from fdcr_fast.fisher.model import hooks
from fdcr_fast.fisher.model.switches import Switch


def _attention_kernels() -> tuple[bool, ...]:
    return tuple(enabled() for enabled, _ in _ATTENTION)


def _set_attention_kernels(enabled: Sequence[bool]) -> None:
    for (_, enable), on in zip(_ATTENTION, enabled, strict=True):
        enable(on)


def _parametrisations_cached() -> tuple[int, dict[Any, Any]]:
    return parametrize._cache_enabled, parametrize._cache


def _cache_parametrisations(cached: tuple[int, dict[Any, Any]] | None) -> None:
    parametrize._cache_enabled, parametrize._cache = cached or (0, {})


_fastpath = Switch(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled)
_onednn = Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled)
# What is computed from other parameters than those of the moment, and what would be kept beyond them.
_cache_of_parametrisations = Switch(_parametrisations_cached, _cache_parametrisations, None)
_ATTENTION: list[tuple[Callable[[], bool], Callable[[bool], Any]]] = [
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
]
_fused_attention = Switch(_attention_kernels, _set_attention_kernels, (False, False, False, True))


@contextmanager
def evaluation() -> Iterator[None]:
    """A context with gradients, whatever the caller's is, in which models are called module by module.

    The graphs of ``torch.compile`` have no place in which to record layers. The fast path of ``nn.TransformerEncoder``
    goes over nested tensors, which have no gradients; it is taken where all its parameters are frozen.
    """
    with _fastpath, _cache_of_parametrisations, torch.inference_mode(False), torch.enable_grad(), _uncompiled():
        yield


def _uncompiled() -> AbstractContextManager[Any]:
    """A context without compiled functions; without the compiler, which is slow to import, there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def vectorisation(model: nn.Module) -> Iterator[None]:
    """A context for ``vmap(grad)`` of a model.

    Fused attention has no batching rule. oneDNN's recurrent layers give wrong bias gradients.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with _onednn if recurrent else nullcontext(), _fused_attention:
        yield


def refuse_conversion(*_: Any) -> None:
    """The replacement for ``nn.Module._apply``, which crashes the process where parameters are wrapped by ``vmap``."""
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
