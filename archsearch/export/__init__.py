"""Exports: a found architecture as a model that other tools can train and serve."""

from __future__ import annotations

from archsearch.export.writer import FORMATS, Format, export_candidate

__all__ = ["FORMATS", "Format", "export_candidate"]
