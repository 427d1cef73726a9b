"""Agents as a load: conversations with pauses, what they cost at least, and who drives them."""
