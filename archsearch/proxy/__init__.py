"""Proxy training: the short training that scores a candidate."""
