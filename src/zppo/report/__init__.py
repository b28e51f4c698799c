"""What a run left, read and shown: figures, audits, intervals, cost."""
