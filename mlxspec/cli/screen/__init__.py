"""What a person sees: the terminal, the live display, and the lines on both streams."""
