"""The routes that are mlxspec's own: `/generate`, the page, and what can be seen of the server."""
