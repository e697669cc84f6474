"""The verb `cpcscale bench` as a Ray job: `ray job submit --working-dir . -- python jobs/bench.py feed CONFIG`."""

import sys

from cpcscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
