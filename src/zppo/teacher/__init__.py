"""The frozen teacher: it speaks in prompts only, nothing it writes carries gradient."""
