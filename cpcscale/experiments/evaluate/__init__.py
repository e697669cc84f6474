"""`cpcscale evaluate`: recognisers on degraded audio, with fewer labels, or on other corpora."""
