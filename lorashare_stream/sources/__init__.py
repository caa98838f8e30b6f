"""Where adapters come from: folders, globs, manifests and the Hub, resolved to named adapters."""

from .local import resolve
from .source import Listing, Source, unique

__all__ = ["Listing", "Source", "resolve", "unique"]
