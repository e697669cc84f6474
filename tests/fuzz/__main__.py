"""See fuzz/runner.py; workers import that module, which the main one of a package cannot be."""

import sys

from fuzz.runner import main

if __name__ == "__main__":
    sys.exit(main())
