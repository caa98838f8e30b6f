"""Resumable state: the journal, moments, the lock."""
