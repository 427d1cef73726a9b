"""Where contents of KV blocks are kept below the provider's memory: host, disk, elsewhere."""
