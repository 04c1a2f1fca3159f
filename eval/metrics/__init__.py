"""Scores of answers: pure functions, one file a family of benchmarks."""
