"""The HTML page of `cpcscale compare`: one file with its plots inside."""
