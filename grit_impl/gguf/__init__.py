"""GGUF files and Modelfiles as formats, and llama.cpp, which runs them."""
