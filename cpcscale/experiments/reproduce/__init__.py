"""`cpcscale reproduce`: the results table of all systems."""
