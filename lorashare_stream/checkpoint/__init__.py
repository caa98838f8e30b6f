"""The SHARE checkpoint: format, staging, publishing, reading."""
