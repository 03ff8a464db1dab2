"""Callbacks that put a controller on other people's trainers; each imports its own library."""
