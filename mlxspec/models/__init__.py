"""mlx-lm's models with the past of a text: passes, taking rows back, and prefill."""
