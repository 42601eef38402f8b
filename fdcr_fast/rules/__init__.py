"""Who decides: ``base`` is one aggregation from beginning to end, and every rule is a file of its own."""
