"""What verbs show of plain values: text for a terminal, plots, and the comparison of tracked runs as one HTML page."""
