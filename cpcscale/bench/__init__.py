"""Speed, as ratios measured in one run: the feed against the bare decoder and its peers, the plan at any size."""
