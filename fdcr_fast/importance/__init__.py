"""From a model and data to the importance of every parameter: the diagonal Fisher.

``fisher`` is what users call. ``data`` cuts what they give into batches, ``kinds`` and ``losses`` say of what the
gradient is taken. ``estimate`` adds up the squares: ``capture`` records what goes through the layers, ``graph`` takes
the gradients at their outputs, ``rules`` turns both into squared per-sample gradients layer by layer, and
``per_sample`` does the same for whatever has no rule.
"""
