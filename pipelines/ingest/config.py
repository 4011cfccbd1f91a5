"""Keys of `ingest`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class IngestConfig(BaseModel):
    """ingest: a LaMP folder, JSONL or Parquet -> the tables histories and requests of one population.

    Route: pieces of the source -> ParsePieces (checked rows) -> by bucket -> MergeBucket (files) -> one commit a table.
    Unit of work: a history item, a request (derived ones included). Rows that cannot be used stand in `rejects`, with a
    reason and the place they came from. A second ingest into the same tables adds to them; see `mode`.
    A run_id stands for its sources and config: the same again goes on where the run stopped, and other ones are
    refused.

    LaMP: one split of a folder as published, plain or gzipped; a question's history is its profile. With `download` it
    is fetched from the benchmark's site first, and `split` says which separation and part: time, user, time/dev, ...
    JSONL, Parquet: `source` has a history item a row (user_id, item_id, occurred_at, and either a mapping `fields` or
    the other columns as fields), `requests_source` a request a row (request_id, user_id, input, as_of, target).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: str
    """Folder or s3://bucket/prefix of the population's tables."""
    source: str | None = None
    """LaMP folder, or file or folder of history items."""
    requests_source: str | None = None
    """File or folder of requests, JSONL or Parquet."""
    format: Literal["auto", "lamp", "jsonl", "parquet"] = "auto"
    """Format of the source; auto goes by the names of its files."""
    split: str = "train"
    """LaMP: which `<split>_questions.json`; with download also time, user, time/dev and the like."""
    download: str | None = None
    """A LaMP task to fetch from the benchmark's site, such as LaMP_2."""
    address: str = "https://ciir.cs.umass.edu/downloads/LaMP"
    """Address of the benchmark's site."""
    download_dir: str = "data/LaMP"
    """Folder that downloads are kept in; a rerun fetches only what is missing."""
    task: str | None = None
    """A LaMP task's name or a YAML file; a LaMP folder with golds names its own."""
    columns: dict[str, str] = {}
    """Our name -> the source's column. Names other than the known ones become fields, and then only these do."""
    history_scope: Literal["auto", "user", "question"] = "auto"
    """LaMP: one history a user or one a question; auto: a user's when dates prove that it gives the same."""
    questions: Literal["keep", "skip"] = "keep"
    """LaMP: skip to take the profiles only."""
    derive_requests: int = Field(0, ge=0)
    """Each user's newest items that also become requests with a known answer."""
    mode: Literal["upsert", "replace"] = "upsert"
    """upsert: rows are added to what the tables hold. replace: the sources are all there is, other rows go; a table
    that no source feeds stays as it is. A run with more rejects than max_reject_fraction, or with an unreadable file,
    replaces nothing; an upsert adds its good rows all the same."""
    buckets: int | None = Field(None, gt=0, le=65_536)
    """Partitions of new tables; from the source's size when not given."""
    max_reject_fraction: float = Field(0.1, ge=0, le=1)
    """More rejects than this share of the rows end the run with exit code 3."""
    run_id: str | None = None
    """The same id again goes on where that run stopped, with the same sources and config only."""
    run_dir: str | None = None
    """Folder of report.json; runs/<run_id> when not given."""

    @model_validator(mode="after")
    def _there_is_something_to_read(self) -> Self:
        if self.download is not None and (self.source or self.requests_source):
            raise ValueError("download is itself the source: leave source and requests_source out")
        if self.source is None and self.requests_source is None and self.download is None:
            raise ValueError("neither source nor requests_source nor download is given: name what to read")
        return self
