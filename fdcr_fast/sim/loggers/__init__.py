"""Loggers of runs, each of which needs the extra of its name; rounds.csv and summary.json need none."""
