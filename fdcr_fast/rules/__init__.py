"""Who decides: ``base`` is one aggregation from beginning to end, every rule is a file of its own, and ``table`` names
them.
"""
