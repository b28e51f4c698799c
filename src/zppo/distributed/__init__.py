"""Several processes: gathered work, replicated and sharded weights, the launcher."""
