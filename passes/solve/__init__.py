"""From a Problem to a Solution: `problem` (the data), `brute` (the oracle), `ilp` (the answer)."""
