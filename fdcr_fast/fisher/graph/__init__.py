"""What the autograd graph of a batch's losses tells.

``capture`` records, in the forward pass, which places of the graph belong to calls of layers. ``autograd`` walks the
graph: what the losses depend on, and by how many ways. ``provenance`` says whose sample every entry of a tensor in it
is. ``entries`` finds parameters outside of layers that enter it in simple ways, and ``gradients`` goes back through it.
"""
