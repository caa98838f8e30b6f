"""The passes over adapters and modules: ingest, accumulate, fit, project, slice, verify."""
