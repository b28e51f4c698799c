"""Images by reference: read, checked, decoded, kept. Nothing above holds pixels for longer than it needs them."""
