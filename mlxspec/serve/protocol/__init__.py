"""What the protocols share: from a body's fields to a request, and from a text to an answer."""
