"""Immutable tars to batches in a known order: plan and windows are pure, lanes are arithmetic, the feed reads."""
