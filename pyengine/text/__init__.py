"""Text on its way in and out: chat templates, tokens, whole characters, stop strings. Import the modules; this holds nothing."""
