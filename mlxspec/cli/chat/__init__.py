"""`mlxspec chat`: the prompt, its keys, and the commands of a conversation."""
