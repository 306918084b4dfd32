"""Builds and runs networks: layers, decode kernels and the hybrid language model."""
