"""Grids that simulate all clients: in this process, or in Ray actors."""
