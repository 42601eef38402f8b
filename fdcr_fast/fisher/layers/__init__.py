"""What the library knows of single layers.

``table`` says what a rule is, registers rules and holds all of them; ``linear``, ``convolution``, ``embedding`` and
``norm`` hold those of one family of layers each. ``recurrent`` takes recurrent layers apart into linear maps, for which
no rule is needed, with the steps of their ``cells``.
"""

from fdcr_fast.fisher.layers import convolution, embedding, linear, norm
from fdcr_fast.fisher.layers.table import RULES, Rule, rule

__all__ = ["RULES", "Rule", "convolution", "embedding", "linear", "norm", "rule"]
