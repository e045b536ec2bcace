"""Errors, files written whole or not at all, the Hub, parameters that an engine has sharded."""
