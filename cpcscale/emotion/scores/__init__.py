"""What predictions are worth: CCC with intervals, tests between systems, tables."""
