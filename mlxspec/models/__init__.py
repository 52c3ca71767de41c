"""mlx-lm's models with the past of a text: passes, going back, and reading a prompt."""
