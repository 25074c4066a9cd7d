"""The scripted Ollama and the breaking proxy, as fixtures."""

from fakes import chaos, fake_ollama, seeded

__all__ = ["chaos", "fake_ollama", "seeded"]
