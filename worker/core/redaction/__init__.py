"""Find API keys and mask personal data in texts. Pure."""
