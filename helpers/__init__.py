"""Thin helpers under the notebooks; each module is imported by its own name."""
