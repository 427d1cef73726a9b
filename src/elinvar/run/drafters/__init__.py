"""Drafters: who guess what the target will sample next, one file each (docs/speculation.md)."""
