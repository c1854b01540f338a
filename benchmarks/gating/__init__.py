"""The experiment behind `benchmarks/gates.py`: gates fail for a reason, and never by chance."""
