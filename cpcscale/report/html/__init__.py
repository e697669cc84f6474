"""The page of compared runs: one HTML file with its plots."""
