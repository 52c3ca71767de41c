"""Choosing the drafter and the number of draft tokens by measured time. No MLX."""
