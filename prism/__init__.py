"""Prism serves many LLMs on shared devices through one OpenAI-compatible endpoint."""

from __future__ import annotations

__version__ = "0.1.0"
