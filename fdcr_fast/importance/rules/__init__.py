"""Squared per-sample gradients of a layer from its input and the gradient at its output: one rule per layer type.

``table`` says what a rule is and holds all of them; each other module holds those of one family of layers.
"""

from fdcr_fast.importance.rules import convolution, embedding, linear, norm
from fdcr_fast.importance.rules.table import RULES, Rule, rule

__all__ = ["RULES", "Rule", "convolution", "embedding", "linear", "norm", "rule"]
