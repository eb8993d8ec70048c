"""Generate, score, report."""
