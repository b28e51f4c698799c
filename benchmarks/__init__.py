"""Speed and memory, side by side with a peer in one run; `make bench` runs every row, docs/performance.md shows the results."""
