"""The images that a federation learns from, and which of them each client has."""
