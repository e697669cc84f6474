"""The two passes of `cpcscale pack`, from finding files to one published tar; shards/pack.py puts them together."""
