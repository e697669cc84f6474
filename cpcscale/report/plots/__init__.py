"""Single pictures as PNG."""
