"""From logits to the next token: scores, random numbers, and the rules of verification."""
