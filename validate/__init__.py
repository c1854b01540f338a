"""Proof that an artifact is right, and how fast it is: parity, accuracy, latency, reports."""
