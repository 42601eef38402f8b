"""What is kept of one round: an :class:`UpdateStore` of rows in memory, in pinned memory, in a file, or in the tensors
in which they came. ``new_rows`` says which of these, ``attendance`` whose they are, ``upload`` what a client may send.
"""
