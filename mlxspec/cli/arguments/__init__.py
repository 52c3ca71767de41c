"""What a person asks for: options, prompts, help, and words for calls that are wrong."""
