"""Measurements of the library against its peers; ``python -m benchmarks`` runs them all."""
