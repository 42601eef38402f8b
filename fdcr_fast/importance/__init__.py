"""From a model and data to the importance of every parameter: the diagonal Fisher.

``fisher`` is what users call. ``data`` cuts what they give into batches, ``kinds`` and ``losses`` say of what the
gradient is taken. ``model`` and ``stateless`` call the model with any values and leave it as it was, on the tensors of
``values``. ``estimate`` adds up the squares: ``capture`` records what goes through layers, ``graph`` tells what the
losses depend on in which way, with ``provenance`` whose sample every entry of a tensor is, and takes the gradients;
``rules`` turn these into squared per-sample gradients layer by layer, ``entries`` for parameters outside of layers, and
``per_sample`` for whatever is left. ``recurrent`` takes recurrent layers apart for ``entries``, with the steps of their
``cells``. ``check`` compares all of it with plain autograd on one sample.
"""
