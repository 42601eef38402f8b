"""One run: its rounds, what is measured in them, and its folder, figures and tables."""
