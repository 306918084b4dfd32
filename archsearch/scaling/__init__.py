"""Depth and width: how the loss falls with both, and which pair is best for a latency. Never imports torch."""
