"""What kind of media some bytes are. Pure."""
