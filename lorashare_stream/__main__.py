"""`python -m lorashare_stream`."""

from .cli.app import main

raise SystemExit(main())
