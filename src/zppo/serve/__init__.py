"""`zppo serve MODEL`: an OpenAI-compatible chat-completions server over the transformers engine."""
