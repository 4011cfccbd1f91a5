"""Formats in which people keep histories, one module per format. A new format is its module and its name here."""

from pipelines.ingest.sources import delimited, delta, iceberg, jsonl, lamp, parquet, query, text  # noqa: F401
