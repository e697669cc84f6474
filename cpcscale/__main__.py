"""`python -m cpcscale` is the console script `cpcscale`."""

from cpcscale.cli import main

raise SystemExit(main())
