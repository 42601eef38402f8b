"""Rules that look at every parameter by itself."""
