"""Latency: how fast an architecture decodes on this device."""
