"""Flower client app."""
