"""Flower server app."""
