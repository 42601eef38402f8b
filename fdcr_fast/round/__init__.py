"""One round as rules see it: its clients (``client_updates``), who is refused (``screening``), where their numbers lie
(``tiles``, ``shard``) and how these are read (``readings`` by kernels, ``columns`` in plain PyTorch).
"""
