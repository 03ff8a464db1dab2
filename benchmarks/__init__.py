"""Speed, each against a peer or a limit, both sides in one run; `python -m benchmarks.NAME`."""
