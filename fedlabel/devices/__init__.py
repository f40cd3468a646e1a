"""Clients as machines: how fast they compute and send, how much memory they have, and when they are there."""
