"""Replays traffic against OpenAI-compatible servers and measures what comes back: `prism bench`."""
