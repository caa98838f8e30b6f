"""Stages of a run over adapters and modules: ingest, accumulate, fit, project, encode, slice, verify."""
