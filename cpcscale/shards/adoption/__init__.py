"""Indexes tars that were not made by `cpcscale pack`: their members, labels and lengths."""
