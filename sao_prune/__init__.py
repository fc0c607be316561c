"""Sparse orthogonal networks from the first step."""
