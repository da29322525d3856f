"""API keys and personal data found in texts. Pure."""
