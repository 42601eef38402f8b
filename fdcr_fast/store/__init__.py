"""What is kept of one round: an :class:`UpdateStore` of rows in memory, in pinned memory, in a file, or in the tensors
in which they came; ``upload`` says what a client may send.
"""
