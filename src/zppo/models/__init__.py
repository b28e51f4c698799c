"""The student: checkpoints in, parts, adapters, optimizer."""
