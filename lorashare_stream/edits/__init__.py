"""Edits of a checkpoint: adapters added or removed, another k or limit."""
