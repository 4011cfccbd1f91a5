"""Keys of the jobs that run a whole line, and of the tiny LM."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from pipelines.engines.base import Decoding, EngineConfig
from pipelines.job_config import JobConfig
from pplug.adapter import LoraConfig
from pplug.encoder import EncoderConfig
from pplug.fit_config import FitConfig
from pplug.llm import LLMConfig
from pplug.retrieval import InTraining, RetrievalConfig
from pplug.settings import Settings
from pplug.tiny_lm import TinyLMConfig

SOFT_PROMPT = "plug:soft-prompt"


BASE_LM = "base-lm"
"""The name that stands for the tiny LM where it is given as llm.model; that LM is then trained first."""


class TaskBase(Settings):
    """Sets how the LLM learns the task from the train users' items before the dev users' adapters stand on it."""

    epochs: int = Field(1, gt=0)
    """Number of passes over the examples."""
    max_history_items: int = Field(10_000, gt=0)
    """Number of newest items of a train user to learn from."""
    lora: LoraConfig = LoraConfig()
    """Settings of the adapter that is merged into the LLM."""


class Model(Settings):
    """An LLM, how it replies, and the plug's shape for it."""

    llm: LLMConfig
    """The LLM; its model may be `base-lm`, a tiny one that is trained first, on the train users' items."""
    lm: TinyLMConfig = TinyLMConfig()
    """Settings of the tiny LM's training, where `llm.model` is `base-lm`."""
    engine: EngineConfig = EngineConfig()
    decoding: Decoding = Decoding()
    shape: dict[str, Any] = {}
    """Shape of the plug, as `train` takes it."""
    lora: LoraConfig = LoraConfig()
    """Settings of the dev users' adapters, which are trained where a method uses them."""
    max_adapter_items: int = Field(10_000, gt=0)
    """Number of newest items of a dev user that the user's adapter learns from."""
    task_base: TaskBase | None = None
    """Task adaptation of the LLM that adapters stand on; default: they stand on the LLM as it is. The other methods
    reply by the LLM as it is in either case; `adapter:none`, by the adapted LLM without an adapter, tells what the task
    adaptation alone gives."""


class LampConfig(Settings):
    """Job `lamp`: one data set in LaMP's layout from its files to the report, by one command.

    Fetches train and dev of one separation of the benchmark (or reads a folder of one's own), then runs the jobs as a
    user would (each command is printed, its config is left below the run folder): ingest, refresh and train on train;
    ingest, refresh, generate and evaluate on dev; `base-lm` and `adapt` where they are asked for. A rerun goes on where
    it broke off. pipelines/configs/lamp_*.yaml hold the paper's settings of each task, tiny_*.yaml those for a machine
    of two cores without a model hub.
    Unit of work: a job.

    [1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901.
    """

    task: str
    """A LaMP task, such as LaMP_2, or the YAML file of one's own."""
    models: dict[str, Model]
    """The LLMs that can be used, each by a name of one's own."""
    use: str
    """Name of the model in `models` that this run uses."""
    encoder: EncoderConfig = EncoderConfig()
    fit: FitConfig = FitConfig()
    methods: tuple[str, ...] = ("none", "bm25", "plug", "plug:no-history", "plug:other-user")
    """Methods that are compared, as in `generate`; plug:soft-prompt trains a second plug, without histories."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Settings of retrieval as in `generate`; its encoder is the one above."""
    retrieve: InTraining = "none"
    """Retrieval that stands in the prompts that the plugs are trained with, as in `train`, with `retrieval.k` items."""
    source: str | None = None
    """Folder in LaMP's layout with the splits train and dev; default: the benchmark's files are downloaded."""
    derive_requests: tuple[int, int] | None = None
    """Newest items of each train and each dev user that become requests; default: the published questions are used."""
    limit: tuple[PositiveInt | None, PositiveInt | None] | None = None
    """Numbers of train and of dev users to take, for a first try; null takes all. A greater one keeps the same users
    and more."""
    separation: Literal["time", "user"] = "time"
    """The benchmark's split; the paper's figures belong to the time separation."""
    address: str | None = None
    """Address of the benchmark's site, where it has moved."""
    download_dir: str = "data/LaMP"
    """Folder that downloads are kept in."""
    workers: int = Field(1, gt=0)
    """Number of workers, and so of GPUs if `gpus_per_worker` is 1."""
    gpus_per_worker: float = Field(1.0, ge=0)
    """GPUs per worker; 0 on a CPU."""
    run_id: str | None = None
    """Name of the run; default: the task's name and the model's."""
    run_dir: str | None = None
    """Tables, plug and reports lie below; default: runs/<run_id>."""

    @model_validator(mode="after")
    def _the_model_is_there(self) -> Self:
        if self.use not in self.models:
            raise ValueError(f"use={self.use} is none of the models {', '.join(self.models)}")
        if self.derive_requests and self.source is None and self.separation == "time":
            raise ValueError(
                "derive_requests needs the key source: train and dev of the benchmark's time separation are the same "
                "people, so that answers of dev would stand in the histories that train learns from"
            )
        return self


class QuickstartConfig(Settings):
    """Job `quickstart`: a file of one's own -> a report with a plug, by one command.

        quickstart reviews.csv

    Runs the jobs as a user would (each command is printed, its config is left below the run folder): `ingest --check`,
    which proposes a mapping and a task; ingest of the train users and of the dev users, who are told apart by a hash of
    their ids; refresh and train on train; refresh, generate and evaluate on dev. Where no LLM is named, a tiny one is
    trained on the train users' items first: it compares methods, and says nothing of what a real LLM would reach.
    The mapping stands in own.yaml of the run folder, the task in own-task.yaml: where they are not as they should be,
    mend them and run the same command again, which then makes all but these two anew. A rerun goes on where it broke
    off. Unit of work: a job.
    """

    positional: ClassVar[str] = "source"
    """Name of the key whose value may follow the job directly."""

    source: str | tuple[str, ...]
    """File, folder or pattern of history items, in any format that `ingest` reads except for LaMP's layout, which is
    for the job `lamp`."""
    columns: dict[str, str] = {}
    """Column of the source for each of our names, where the proposal is wrong, such as user_id=author,text=body."""
    task: str | None = None
    """YAML file with a task; default: the one that the columns suggest."""
    format: str | None = None
    """Format of the source, as in `ingest`; default: by the names of its files."""
    explode: str | None = None
    """Column with a list, each element of which becomes an item, as in `ingest`."""
    query: str | None = None
    """SQL that makes the items, as in `ingest`."""
    csv: dict[str, str] = {}
    """Form of CSV files, as in `ingest`, such as csv.header=false."""

    @field_validator("csv", mode="before")
    @classmethod
    def _as_words(cls, value: Any) -> Any:
        """A truth value of a file is the word that a flag has for it."""
        if not isinstance(value, dict):
            return value
        return {name: str(one).lower() if isinstance(one, bool) else one for name, one in value.items()}

    time: dict[str, str] = {}
    """Meaning of the values in time columns, as in `ingest`, such as time.format=%d.%m.%Y."""
    limit: int | None = Field(None, gt=1)
    """Number of users to take, for a first try with a large source."""
    llm: LLMConfig = LLMConfig(model=BASE_LM)
    """The LLM; its model is `base-lm`, a tiny one that is trained first, where none is named."""
    lm: TinyLMConfig = TinyLMConfig(
        vocab_size=2048, max_tokens=160, batch_tokens=2048, steps=500, learning_rate=2e-3
    )  # two minutes on two cores
    """Settings of the tiny LM's training, where `llm.model` is `base-lm`."""
    engine: EngineConfig = EngineConfig()
    methods: tuple[str, ...] = ("none", "bm25", "plug", "plug:other-user")
    """Methods that are compared, as in `generate`."""
    gpus_per_worker: NonNegativeFloat | Literal["auto"] = "auto"
    """GPUs of the one worker. auto: 1 where torch finds a GPU on this machine, else 0."""
    run_id: str | None = None
    """Name of the run; default: quickstart and the source's name."""
    run_dir: str | None = None
    """Tables, plug and reports lie below; default: runs/<run_id>."""


class BaseLMConfig(JobConfig):
    """Job `base-lm`: a histories table -> a tiny decoder-only language model with its tokenizer.

    The job serves to try the line where no model can be downloaded, and nothing else: a model of some million
    parameters that has read nothing but these items knows its one task only.
    Each item becomes a prompt (the task's input template) and a target; nothing says whose item it is. Items that a
    request of their user may not see are left out, since they hold answers that the model would be scored on; with
    tables of other users than those who are evaluated, `--cut none` uses all items. A rerun that would train the same
    model on the same texts finds it there and leaves it.
    Unit of work: a history item.
    """

    output: str
    """Folder the model is written to."""
    prompt: str | None = None
    """Template of the prompt; default: the task's own `input`. It may name fields that only these items have."""
    suffix: str = "\n"
    """Text between prompt and target; give the same as llm.layout.suffix."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    cut: Literal["requests", "none"] = "requests"
    """requests: items that one of the user's requests may not see are left out; none: all items count, for a model made
    from other users than those who are evaluated."""
    max_items: int = Field(200_000, gt=0)
    """Upper limit of the items to train on. The items of the first buckets are taken, whole users by chance; the
    rest is not read."""
    lm: TinyLMConfig = TinyLMConfig()
    threads: int | None = Field(None, gt=0)
    """Torch threads; default: all cores."""
    max_reject_fraction: float = Field(0.1, ge=0, le=1)
    """More rejects than this share of the items end the run with exit code 3."""


QUICK = {"train_users": 200, "test_users": 100, "adapter_users": 20, "corpus_users": 1500, "lm_steps": 1200}
"""Numbers that `quick` puts in the place of those that were not given."""


class DemoConfig(Settings):
    """Job `demo`: the whole line on an embedded world, no download, a CPU is enough.

    Writes a population whose truth is known, trains a tiny base LM on other people's texts, then runs the jobs as a
    user would (each command is printed): ingest, refresh, train, adapt, generate, evaluate. The last table shows how
    well people the plug was never trained on are served by it, beside the best possible score without and with
    personalisation; the one before it shows the plug beside adapters, for some users who own one.
    """

    run_dir: str = "runs/demo"
    """Everything is written below; a demo that stood there before is removed."""
    run_id: str = "demo"
    """Name of the evaluation's run."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the world and of every training."""
    quick: bool = False
    """True takes fewer people wherever no number is given: the same table with wider intervals, in less time."""
    train_users: int = Field(360, gt=1)
    """Number of users that the plug learns from."""
    test_users: int = Field(400, gt=1)
    """Number of users that neither LM nor plug were trained on; each has five requests."""
    adapter_users: int = Field(80, gt=1)
    """Number of test users who get an adapter, trained on what came before their requests."""
    corpus_users: int = Field(2000, gt=1)
    """Number of other users, whose texts the base LM learns from."""
    lm_steps: int = Field(1500, gt=0)
    """Training steps of the base LM."""
    epochs: int = Field(5, gt=0)
    """Passes over the train users' requests in the training of the plug."""

    def sized(self) -> Self:
        """The config with the numbers of a quick demo, where it is one, in place of those that were not given."""
        smaller = {name: QUICK[name] for name in QUICK.keys() - self.model_fields_set}
        return self.model_copy(update=smaller) if self.quick else self
