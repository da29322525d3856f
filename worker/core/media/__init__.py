"""Detect the media type of bytes and links. Pure."""
