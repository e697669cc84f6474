"""The verb `cpcscale finetune` as a Ray job: `ray job submit --working-dir . -- python jobs/finetune.py ...`."""

import sys

from cpcscale.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
