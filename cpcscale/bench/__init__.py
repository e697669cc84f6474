"""`cpcscale bench`: speed as ratios measured in one run: the feed against a bare decoder and other libraries, updates
against a plain network, and the order of the data and the actors of a run at any size."""
