"""A checkpoint, changed: adapters added, taken out, another k."""
