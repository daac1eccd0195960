"""Speed and quality of tinygrad_llm in figures: `python -m benchmarks --help`, and README.md."""
