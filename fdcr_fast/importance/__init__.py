"""From a model and data to the importance of every parameter: the diagonal empirical Fisher.

``capture`` records what goes through the layers, ``rules`` turns it into squared per-sample gradients layer by layer,
``per_sample`` does the same for whatever has no rule, ``fisher`` puts them together.
"""
