"""The verb `cpcscale reproduce` as a Ray job: `ray job submit --working-dir . -- python jobs/reproduce.py ...`."""

import sys

from cpcscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
