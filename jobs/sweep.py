"""The verb `cpcscale sweep` as a Ray job: `ray job submit --working-dir . -- python jobs/sweep.py ...`."""

import sys

from cpcscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
