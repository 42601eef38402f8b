"""Rules that compare clients with each other."""
