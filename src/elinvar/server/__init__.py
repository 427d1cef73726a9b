"""The HTTP door: the OpenAI-compatible API over an AsyncEngine."""
