"""KV accounting: block pools, block tables, prefix reuse. Knows ids and counts, never arrays."""
