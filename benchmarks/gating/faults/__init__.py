"""Faults that are planted into saved artifacts: one file per runtime, and one for all."""
