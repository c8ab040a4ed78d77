"""The published tables: rows, comparison, verdicts."""
