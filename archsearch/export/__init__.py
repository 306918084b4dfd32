"""Exports: a found architecture as a model that other tools can train and serve."""
