"""From a model and data to the diagonal Fisher.

The rooms, each of which imports from those before it only:

``layers``
    What the library knows of single layers: the rules, which turn a layer's input and the gradient at its output into
    squared per-sample gradients, and recurrent layers taken apart.
``graph``
    What the autograd graph of a batch's losses tells: which layers and parameters enter it in which ways, whose sample
    every entry of a tensor is, and the gradients.
``model``
    A model called with any values and in any mode, and left as it was.

Beside them: ``data`` cuts what users give into batches; ``losses`` and ``kinds`` say of what the gradient is taken;
``per_sample`` takes gradients sample by sample, of any model; ``estimate`` adds up the squares, by layers and by the
graph where these hold and by ``per_sample`` for whatever is left; ``check`` compares that with plain autograd on two
samples; ``diagonal`` has the functions that users call.
"""
