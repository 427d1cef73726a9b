"""The step loop with text at both ends: engine core, sync and async API."""
