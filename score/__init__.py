"""Scores: from arrays, as a verb, as a page."""
