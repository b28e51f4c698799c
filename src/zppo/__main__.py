"""`python -m zppo` is the command line."""

from zppo.cli import main

raise SystemExit(main())
