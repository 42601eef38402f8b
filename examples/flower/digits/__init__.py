"""Handwritten digits in a federation: flwr run examples/flower --stream, or python examples/flower/run.py"""
