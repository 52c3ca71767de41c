"""Pairs of models: the table, the folders and repositories, and loading them."""
