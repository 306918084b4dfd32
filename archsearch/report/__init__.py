"""Tables and pictures of a run."""

from __future__ import annotations

from archsearch.report.files import write_report
from archsearch.report.table import csv_text, table

__all__ = ["csv_text", "table", "write_report"]
