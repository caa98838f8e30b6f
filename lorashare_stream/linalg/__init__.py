"""Moments, eigenpairs, bases, errors of dW; no file is known here."""
