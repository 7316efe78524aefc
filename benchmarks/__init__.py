"""Named problems, kernel and whole-step benchmarks."""
