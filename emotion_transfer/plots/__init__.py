"""Figures: every function takes data and returns a matplotlib ``Figure``; none touches pyplot."""
