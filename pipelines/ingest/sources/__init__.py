"""Formats in which people keep histories, one module per format. A new format is its module and its name here."""

from pipelines.ingest.sources import jsonl, lamp, parquet  # noqa: F401
