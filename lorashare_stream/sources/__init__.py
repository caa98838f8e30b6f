"""Where adapters come from: folders, globs and manifests, resolved to named adapters."""

from .local import Source, resolve

__all__ = ["Source", "resolve"]
