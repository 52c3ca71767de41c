"""Decoding: the fused round, a session that runs rounds, and the engine that opens sessions."""
