"""Everything that is fast beside what limits it, in one command: ``python -m pytest benchmarks/limits``."""
