"""The bench: `pytest benchmarks/` guards what the operators are worth, `benchmarks/gpu.sh` measures it on a GPU in one call."""
