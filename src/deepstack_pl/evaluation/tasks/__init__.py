"""Benchmarks over local copies of their published files, one file each; docs/benchmarks.md has their layouts."""
