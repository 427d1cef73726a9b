"""Training: small heads that draft for a model. Needs torch, which `elinvar[train]` brings."""
