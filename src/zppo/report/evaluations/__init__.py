"""Results of `zppo eval` side by side: `zppo eval table`."""
