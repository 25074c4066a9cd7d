"""Ollama's HTTP API: a server over llama.cpp, and a distrustful client for any server that speaks it."""
