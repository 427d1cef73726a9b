"""What speculation is measured on, and with (benchmarks/speculation.py)."""
