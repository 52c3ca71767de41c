"""Sources of proposals: draft models, heads, and drafters that read the text alone."""
