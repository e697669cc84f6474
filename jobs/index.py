"""The verb `cpcscale index` as a Ray job: `ray job submit --working-dir . -- python jobs/index.py ...`."""

import sys

from cpcscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["index", *sys.argv[1:]]))
