"""A server that speaks OpenAI's and Anthropic's protocols, on a batch of rows."""
