"""Which request computes which tokens in the next step. Knows ids and counts, never arrays."""
