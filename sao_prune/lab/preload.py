"""Imported by the server of `start_server` alone, for what it does on import."""

from .server import preload

preload()
