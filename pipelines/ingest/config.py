"""Keys of `ingest`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.ingest.labels import Matching
from pipelines.ingest.sources.base import CsvForm, choices
from pipelines.ingest.times import TimeRule
from pplug.encoder import own_id


class IngestConfig(BaseModel):
    """Job `ingest`: files of any common format -> the tables histories and requests of one population.

    Route: pieces of the source -> ParsePieces (checked rows) -> by bucket -> MergeBucket (files) -> one commit per
    table. Unit of work: a history item or a request (derived ones included). Rows that cannot be used are kept in
    `rejects`, with a reason and the place they came from. A second ingest into the same tables adds to them; see
    `mode`. A run_id stands for its sources and config: the same command goes on where the run stopped, and other
    sources under the same run_id are refused.

    LaMP: one split of a folder as published, plain or gzipped; a question's history is its profile. With `download` it
    is fetched from the benchmark's site first, and `split` names separation and part: time, user, time/dev, ...
    Other formats: `source` has one history item per row (user_id, item_id, occurred_at, and either a mapping `fields`
    or the other columns as fields), `requests_source` one request per row (request_id, user_id, input, as_of, target).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    check: str | tuple[str, ...] | None = None
    """Source to look at, in place of an ingest: it prints the files found, the columns, a mapping and a task that fit
    them, some items as they would read, and rows that would be rejected. It takes seconds and needs no tables."""
    write_config: str | None = None
    """Name for the result of `check`: NAME.yaml, which `ingest --config` takes, and NAME-task.yaml are written."""
    tables: str
    """Folder or s3://bucket/prefix of the population's tables."""
    source: str | tuple[str, ...] | None = None
    """File, folder or pattern such as 'data/*.csv' of history items, or a LaMP folder; on a disk, s3://, or another
    address with its package (gs://, az://, https://, hf://). Several are read in the order given, each by file name."""
    requests_source: str | tuple[str, ...] | None = None
    """File, folder or pattern of requests."""
    vectors_id: str | None = None
    """Name for vectors that you already have, which `refresh` and `train` then take as encoder.model=own:NAME. The
    items bring them in the column `vector`, lists of numbers that are all of one width; an item without one is
    rejected. They are stored L2-normalised, one per user and text: another vector for a text under the same name is
    rejected, so that a new set of vectors needs a new name."""
    vectors: str | tuple[str, ...] | None = None
    """File, folder or pattern with the vectors for vectors_id, where they are no column of the items: rows of user_id,
    item_id and vector. Without a source, they are those of items that the tables hold."""
    follow: bool = False
    """Reading of what has come to a Delta table, the source, since its last ingest with this key; the first one reads
    all. Items that have gone from the table are counted, and listed in the run folder. Tables follow it for one part of
    the users, or for all."""
    apply_deletes: bool = False
    """Removal of the items that `follow` finds gone, or found gone in nights without this key, and of requests derived
    from them. Users of whom no item is left are for `erase`, with the list in the run folder; `compact` drops vectors
    that no item needs."""
    format: Literal["auto", *choices()] = "auto"  # type: ignore[valid-type]
    """Format of the source; auto goes by the names of its files."""
    split: str = "train"
    """Part of a LaMP folder to read, `<split>_questions.json`; with download also time, user, time/dev and the like."""
    download: str | None = None
    """Name of a LaMP task to fetch from the benchmark's site, such as LaMP_2."""
    address: str = "https://ciir.cs.umass.edu/downloads/LaMP"
    """Address of the benchmark's site."""
    download_dir: str = "data/LaMP"
    """Folder that downloads are kept in; a rerun fetches only what is missing."""
    task: str | None = None
    """Name of a LaMP task, or a YAML file with a task; a LaMP folder with golds names its own."""
    columns: dict[str, str] = {}
    """Column of the source for each of our names, with a path into nested ones (user_id=actor.login). Any other name
    becomes a field, and then no unnamed column does. It serves requests too where requests_columns is not given. Ids
    are texts as they stand, whole numbers (7.0 of a column of numbers is 7) or UUIDs. Fields are texts as they stand,
    numbers in their shortest form (4.0 is 4), decimals as given, true, false, ISO dates, and lists joined by a comma
    and a space. Mappings and lists of lists are left out, with a note in the summary; so is pandas' index column."""
    requests_columns: dict[str, str] = {}
    """Column of the requests' source for each of our names; with it, `columns` is for items alone."""
    explode: str | None = None
    """Column with a list, each element of which becomes an item, beside the other columns of its row."""
    query: str | None = None
    """SQL that makes the items, in DuckDB's words; the view `source` stands for the files found."""
    requests_query: str | None = None
    """SQL that makes the requests; the view `source` stands for the files of requests_source."""
    csv: CsvForm = CsvForm()
    allow_empty: bool = False
    """Acceptance of a source without any row, which otherwise ends the run before anything is written."""
    time: TimeRule = TimeRule()
    """Meaning of the values in time columns."""
    undated: Literal["neighbour", "reject", "untimed"] = "neighbour"
    """Treatment of an item without a time whose user has items with one. With neighbour it takes the later
    time of the items before and after it in the order given. With untimed, all of its user's items count by position
    alone."""
    labels: Matching = "normalise"
    """Matching of answers with the task's labels: normalise stores the label where case, spaces or the form of a number
    differ, exact takes its spelling alone, and infer makes labels of the answers that are none yet."""
    show_text: bool = False
    """Show the text of rejected rows on the screen; no file ever holds it."""
    history_scope: Literal["auto", "user", "question"] = "auto"
    """Owner of a LaMP history, a user or one question; auto takes users when dates prove that it gives the same."""
    questions: Literal["keep", "skip"] = "keep"
    """Treatment of the questions of a LaMP folder: they become requests, or only their profiles are read."""
    derive_requests: int = Field(0, ge=0)
    """Number of newest items per user that also become requests, with a known answer. A later ingest with this key
    brings an item's correction to its request, too; one without it leaves derived requests as they are."""
    parts: dict[str, float] = {}
    """Shares of the users by name, such as train=.8,dev=.2. A hash of the id says which part a user is in: parts are
    disjoint, and the same in every ingest with the same shares. A LaMP folder in which questions of one user have a
    history each is refused, because each history would be in a part by itself, and so are requests whose owner_id is
    not their user_id."""
    part: str | None = None
    """Name of the part whose users this ingest keeps."""
    limit: int | None = Field(None, gt=0)
    """Number of users that this ingest keeps, for a first try. A greater limit keeps the same users and more."""
    mode: Literal["upsert", "replace"] = "upsert"
    """Treatment of the rows that the tables hold: upsert keeps them and adds the sources' rows; replace removes all
    that are not in the sources, except in tables that no source feeds; where histories stay, so do requests that alone
    tell whose a history is (owner_id other than user_id). A run with more rejects than max_reject_fraction, or with an
    unreadable file, replaces nothing, while an upsert still adds its good rows."""
    buckets: int | None = Field(None, gt=0, le=65_536)
    """Number of partitions of new tables; it follows from the source's size when not given."""
    max_reject_fraction: float = Field(0.1, ge=0, le=1)
    """Greatest share of rows that may be rejected, those of users left out by part or limit included; more of them end
    the run with exit code 3."""
    run_id: str | None = None
    """Name of this run; give it again, with the same sources and config, to go on where the run stopped."""
    run_dir: str | None = None
    """Folder of report.json; runs/<run_id> when not given."""

    @model_validator(mode="before")
    @classmethod
    def _a_check_names_the_source(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("check") is None:
            if values.get("write_config") is not None:
                raise ValueError("write_config writes the result of a check: give the source as --check SOURCE")
            return values
        if values.get("source") is not None:
            raise ValueError("check names the source itself: leave source out")
        return {"tables": "", **values, "source": values["check"]}

    @model_validator(mode="after")
    def _there_is_something_to_read(self) -> Self:
        if self.download is not None and (self.source or self.requests_source):
            raise ValueError("download is itself the source: leave source and requests_source out")
        if not any((self.source, self.requests_source, self.vectors, self.download)):
            raise ValueError("neither source nor requests_source nor download is given: name what to read")
        return self

    @model_validator(mode="after")
    def _requests_that_are_asked_for_have_their_source(self) -> Self:
        # other keys may stand idle: the config file of a first ingest serves nights of items or of requests alone
        if self.requests_query and self.requests_source is None and self.check is None:
            raise ValueError(
                "requests_query is given without requests_source, whose rows it is for, and no request would be made: "
                "give --requests-source as well, or, for items alone, --requests-query null"
            )
        return self

    @model_validator(mode="after")
    def _the_part_is_one_of_the_parts(self) -> Self:
        if bool(self.parts) != (self.part is not None) or self.part is not None and self.part not in self.parts:
            named = ", ".join(self.parts) or "none"
            raise ValueError(f"part={self.part} and parts={named}: give the shares in parts, and one of their names")
        if any(share <= 0 for share in self.parts.values()) or sum(self.parts.values()) > 1 + 1e-9:
            raise ValueError(f"parts={self.parts}: shares are above 0, and together at most 1")
        return self

    @model_validator(mode="after")
    def _one_table_is_followed(self) -> Self:
        if self.apply_deletes and not self.follow:
            raise ValueError("apply_deletes needs --follow, which finds out what has gone")
        several = not isinstance(self.source, str) and len(self.source or ()) != 1
        if self.follow and (several or self.mode != "upsert" or self.explode or self.query):
            raise ValueError(
                "follow reads one Delta table row by row into tables that grow: give one source, mode=upsert, and "
                "neither explode nor query"
            )
        if self.follow and self.limit is not None:
            raise ValueError(
                "follow notes a version of the table as read, and with limit only some of its users would be: leave "
                "one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _vectors_have_a_name(self) -> Self:
        if self.vectors_id is not None:
            own_id(self.vectors_id)
            if self.vectors is None and self.source is None:
                raise ValueError("vectors_id names vectors, but neither source nor vectors says where they are")
        elif self.vectors is not None or "vector" in self.columns:
            raise ValueError("vectors are given without a name; add --vectors-id NAME, by which refresh finds them")
        return self
