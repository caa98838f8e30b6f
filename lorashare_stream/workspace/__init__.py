"""Workspace: the journal, moments, markers, the lock."""
