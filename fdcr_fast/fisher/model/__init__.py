"""A model called with any values and in any mode, and left as it was.

``inventory`` names what a model consists of and ``settings`` says which models behave alike. ``stateless`` calls the
model on the tensors of ``values`` and puts back what ``snapshot`` has seen; ``modes`` does the same for training and
evaluation. ``workarounds`` are for what PyTorch gets wrong on the way, ``switches`` are those of the whole process, and
``hooks`` notices the hooks of which the graph shows nothing.
"""
