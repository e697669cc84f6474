"""The verb `cpcscale audit` as a Ray job: `ray job submit --working-dir . -- python jobs/audit.py ...`."""

import sys

from cpcscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
