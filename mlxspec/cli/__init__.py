"""The command line: options, prompts, display and commands."""
