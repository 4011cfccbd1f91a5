"""Keys of `refresh`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from pydantic import Field

from pipelines.job_config import ResumableConfig
from pplug.encoder import EncoderConfig
from pplug.settings import renamed


class Config(ResumableConfig):
    """Job `refresh`: histories (+ plug) -> embeddings, personas. The nightly job.

    Only texts without a vector under this encoder's identity are encoded (none with encoder.model=own:NAME, whose
    vectors `ingest` has stored: there every text needs one already); only users whose history changed get a new
    persona; a night on which nothing changed reads nothing and writes nothing, and one on which rows were only added
    reads the histories and vectors of their users only. A text whose vector was not finite is tried again each night.
    Another plug makes all personas anew from the vectors; another encoder fills a table of its own beside the old one,
    and readers switch when its personas are complete. Embeddings are committed first, then personas, which name the
    embeddings version they were made from; both wave by wave.
    Unit of work: a text of a user.
    """

    encoder: EncoderConfig = EncoderConfig()
    plug: str | None = None
    """Plug folder; without one, personas hold mean vectors only."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    max_history_items: int = renamed("history_cap", 512, gt=0)
    """Number of newest items that a persona is made from."""
    workers: int = Field(1, gt=0)
    """Number of encoder actors, and then of actors that make personas: one per GPU, or one per CPU node."""
    min_workers: int | None = Field(None, gt=0)
    """Least number of these actors. The job starts with it; Ray Data adds others up to `workers` while there is work
    for them and room in the cluster, and takes them away again. Default: workers."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """Number of GPUs per encoder actor; 1 on a GPU cluster."""
    gpus_per_persona_worker: float = Field(0.0, ge=0)
    """GPUs of one actor that makes personas, or a fraction of one. Reading takes most of its time, so that a GPU would
    stand idle; a wide plug's first personas of many users are quicker with one."""
    wave_texts: int = Field(200_000, gt=0)
    """Number of texts or personas per commit (one wave). A rerun does not repeat committed waves."""
