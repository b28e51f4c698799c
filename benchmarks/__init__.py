"""Speed and memory, side by side with a peer in one run, and how right the grader is; `make bench` runs every row,
docs/performance.md and docs/grading.md show the results."""
