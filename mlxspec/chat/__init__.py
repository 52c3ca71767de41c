"""A conversation over many turns: what was said, its files, and what of it a model reads."""
