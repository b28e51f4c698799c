"""What a run will take: the dry run, memory, FLOPs."""
