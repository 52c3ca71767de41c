"""Whole answers from a local model first, and from another host where rules ask for it."""
