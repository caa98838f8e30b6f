"""`python -m lorashare_stream`."""

from .cli import main

raise SystemExit(main())
