"""From shards to batches in a known order: order, lanes and windows are pure functions; the feed reads and decodes."""
