"""Rows in a file: its bytes (``format``), writing (``rows``) and reading (``tiles``) it."""
