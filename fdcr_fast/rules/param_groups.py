"""Groups of a model's parameters by what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fdcr_fast.layout import ParamLayout


@dataclass(frozen=True)
class ParamGroups:
    """Which parameters decide between classes, and which find features.

    Attributes:
        head: Ranges of the last linear layer.
        features: Ranges of everything before the last two linear layers.
    """

    head: tuple[slice, ...]
    features: tuple[slice, ...]

    @classmethod
    def whole(cls, num_params: int) -> ParamGroups:
        """All parameters in both groups, for a model of which nothing is known."""
        return cls((slice(0, num_params),), (slice(0, num_params),))

    @classmethod
    def from_layout(cls, layout: ParamLayout) -> ParamGroups:
        """Linear layers told by their shape: modules with a matrix named ``weight``."""
        linear = [
            name.rpartition(".")[0]
            for name, shape in zip(layout.names, layout.shapes, strict=True)
            if name.rpartition(".")[2] == "weight" and len(shape) == 2
        ]
        return cls._of_modules(layout, linear)

    @classmethod
    def from_module(cls, model: nn.Module) -> ParamGroups:
        """Linear layers in the order of ``model.named_modules()``."""
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return cls._of_modules(ParamLayout.from_module(model), linear)

    @classmethod
    def _of_modules(cls, layout: ParamLayout, linear: list[str]) -> ParamGroups:
        """The groups by names of linear layers; of fewer than two, features are all but the head, or everything."""

        def ranges(modules: list[str], inside: bool) -> tuple[slice, ...]:
            return tuple(layout.slices[name] for name in layout.names if (name.rpartition(".")[0] in modules) == inside)

        if not linear:
            return cls.whole(layout.numel)
        head = ranges(linear[-1:], True)
        return cls(head, ranges(linear[-2:], False) or ranges(linear[-1:], False) or head)
