"""Keys of `evaluate`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from typing import Literal

from pydantic import Field, NonNegativeInt

from pipelines.job_config import JobConfig
from pplug.settings import renamed


class EvaluateConfig(JobConfig):
    """evaluate: generations + targets -> report.json, report.html, predictions in LaMP's format, a table on the screen.

    Route: per bucket, facts about the users -> histograms -> thirds; then replies beside targets -> ScoreBuckets
    (sums, plain and resampled over people) -> added up -> scores, 95% intervals, paired differences to the method
    `none`, overall and by third -> the verdict. Unit of work: a request with a target and a method.
    A request is known by user_id and request_id. A reply with an error counts as an empty prediction; of several
    samples the mean counts (F1 and RMSE: all together). A method that lacks replies that others have is refused.
    References that need no LLM are computed from the histories and scored beside the methods
    (pipelines.evaluate.references); they are never counted as methods.
    """

    run: tuple[str, ...] = ()
    """run_id of one or several runs of generate, all of which have ended; the newest complete run when not given. No
    method may be in two of them, unless `pool` is given."""
    methods: tuple[str, ...] | None = Field(None, min_length=1)
    """Methods to score; all methods of the runs by default."""
    users: str | None = None
    """File with one user id per line; only the requests of these users are scored, for example of users with an
    adapter."""
    as_of_version: dict[Literal["histories", "requests", "generations", "personas"], NonNegativeInt] = {}
    """Table versions to read instead of the newest complete one, for example `histories=12`. Any version works until
    `vacuum` removes it."""
    pool: bool = False
    """Pool runs that repeat the same methods and differ in a seed: each method is scored over the replies of all its
    runs. Runs with other methods, such as `plug:soft-prompt`, may stand beside them if they share none with the
    rest."""
    task: str | None = None
    """Task to score by instead of the one stored with the histories: a LaMP name or a YAML file."""
    predictions_dir: str | None = None
    """Folder of <method>.json; predictions below the run folder when not given. A request keeps its id there when no
    other request with a target in these tables (of `users`, where given) has it; requests that share an id are named
    `user_id/request_id`."""
    compare: tuple[str, str] | None = None
    """Two runs of generate, the earlier first, for example of two nights, plugs or LLMs. The later is scored against
    the earlier, method by method, on the requests that both answered; nothing else is scored then."""
    drift: tuple[int, int] | None = None
    """Two versions of the table personas, the earlier first; the report tells how far users have moved between them."""
    drift_threshold: float = Field(0.1, ge=0, le=2)
    """Cosine distance above which a user counts as moved."""
    generate_reports: tuple[str, ...] = ()
    """Paths of the runs' report.json, which hold their seconds; when not given, runs/<run_id>/report.json is read where
    it exists and is of a run in these tables."""
    reference: str | None = None
    """JSON file with best_without_history and best_with_history, where the truth is known."""
    references_from: tuple[str, ...] = ()
    """Tables of other populations, such as the training users. The classifier among the references that need no LLM
    learns from their histories too, and answers in free text that stand word for word there, or as the answers to their
    requests, are counted."""
    examples: int = Field(0, ge=0, le=100)
    """Requests to show side by side in the report, which then holds what users wrote: pass it on accordingly."""
    n_bootstrap: int = renamed("resamples", 2000, ge=100)
    """Number of resamples of people behind each interval."""
    seed: int = 0
    """Seed of the resamples: the same seed gives the same intervals."""
