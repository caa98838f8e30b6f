"""Executors: how tasks are mapped, here or on a cluster."""
