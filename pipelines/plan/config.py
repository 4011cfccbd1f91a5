"""Keys of `plan`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from pydantic import Field, field_validator

from pipelines.plan.rates import GPUS, parameters
from pplug.settings import Settings


class PlanConfig(Settings):
    """Job `plan`: numbers of users, items and requests -> hours, GPUs, bytes and money of each job, on the screen.

        plan --users 10000000 --items 50 --changed 0.01 --llm 8B --gpu H100
        plan --users 200000 --items 50 --rates runs/night-1/report.json,runs/night-2/report.json

    Nothing is started, read from tables or written. Without `rates` the times are floating point operations divided by
    a stated share of the GPU's peak, and every number that enters is printed with its source. With `rates`, jobs that
    these files have measured are planned from them. Unit of work: none.
    """

    users: int = Field(gt=0)
    """Number of users."""
    items: float = Field(50, gt=0)
    """Number of history items per user."""
    changed: float = Field(0.01, ge=0, le=1)
    """Fraction of the items that are new in a night."""
    item_tokens: int = Field(60, gt=0)
    """Number of tokens of an item's text."""
    encoder: str = "22M"
    """Number of parameters of the text encoder, such as 22M (MiniLM) or 568M (BGE-M3)."""
    encoder_dim: int = Field(384, gt=0)
    """Width of the encoder's vectors."""
    llm: str = "8B"
    """Number of parameters of the LLM, such as 8B or 70B."""
    llm_dim: int | None = Field(None, gt=0)
    """Width of the LLM; default: that of a usual model of this size."""
    persona_tokens: int = Field(1, gt=0)
    """Number of persona rows per user."""
    requests: float = Field(1, ge=0)
    """Number of requests per user and run of `generate`."""
    methods: int = Field(1, gt=0)
    """Number of methods that answer each request."""
    prompt_tokens: int = Field(290, gt=0)
    """Number of tokens of a prompt."""
    output_tokens: int = Field(32, gt=0)
    """Number of tokens of a reply."""
    train_samples: int = Field(100_000, ge=0)
    """Number of samples that a plug is trained on."""
    epochs: int = Field(2, gt=0)
    """Number of passes of the training over them."""
    adapters: float = Field(0.01, ge=0, le=1)
    """Fraction of the users who get an adapter of their own."""
    adapter_bytes: int | None = Field(None, gt=0)
    """Bytes of an adapter; default: rank 8 on q_proj and v_proj in 16 bits."""
    gpu: str = "H100"
    """Name of the GPU: H100, H200, A100, L40S, A10G or L4."""
    hours: float = Field(6, gt=0)
    """Number of hours that each job may take; the number of GPUs follows from it."""
    gpu_price: float | None = Field(None, ge=0)
    """Price of a GPU per hour; default: a list price of AWS on demand, which `plan` prints."""
    storage_price: float = Field(0.023, ge=0)
    """Price of a gigabyte per month; the default is the list price of S3 Standard."""
    rates: tuple[str, ...] = ()
    """Files with measured rates: report.json of runs of refresh, train, adapt or generate, or results of `make bench`
    for encode, train, adapters or generate. Reports of two runs of one job that differ in size also tell its
    start-up."""

    @field_validator("gpu")
    @classmethod
    def _known_gpu(cls, gpu: str) -> str:
        found = {name.lower(): name for name in GPUS}.get(gpu.lower())
        if found is None:
            raise ValueError(f"unknown GPU {gpu!r}; known are {', '.join(GPUS)}")
        return found

    @field_validator("llm", "encoder")
    @classmethod
    def _a_size(cls, size: str) -> str:
        parameters(size)
        return size
