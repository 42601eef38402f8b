"""Numbers of parameters of random rounds."""

from hypothesis import strategies as st

from fdcr_fast import ops
from fdcr_fast.round import readings

# From the first number on products are formed in float32; beyond the second one a sample tells who is probably kept.
_ONE_IN = 16
_FLOAT32, _SAMPLED = ops.STRETCH, 2 * readings._FEWEST_SAMPLED
_LARGE = st.integers(_FLOAT32, _SAMPLED) | st.integers(_SAMPLED + 1, _SAMPLED + _FLOAT32)


def sizes(fewest, most):
    """Mostly a few parameters, for naive oracles take long; one round in so many takes the fast path."""
    few = st.integers(fewest, most)
    return st.integers(1, _ONE_IN).flatmap(lambda drawn: _LARGE if drawn == _ONE_IN else few)
