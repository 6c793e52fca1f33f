"""Target gguf: one file for llama.cpp and the apps that are built on it."""
