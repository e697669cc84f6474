"""`cpcscale size`: time, cores, memory and traffic of a pretraining, estimated before it starts."""
