"""Keys of `train`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from pipelines.job_config import ResumableConfig
from pipelines.tracking import Tracker
from pplug.encoder import EncoderConfig
from pplug.fit_config import FitConfig
from pplug.llm import LLMConfig
from pplug.retrieval import InTraining, ShownItems
from pplug.settings import Settings, added, renamed


class PlugShape(Settings):
    """Sets what kind of plug is trained."""

    persona_tokens: int = Field(1, gt=0)
    """Number of rows that a persona takes in the prompt; the paper uses 1."""
    aggregation: Literal["attention", "mean"] = "attention"
    """Weights of the items. attention: by likeness to the query. mean: all alike, so that refresh can store the
    persona."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of the likeness before the softmax; the paper uses 1."""
    query_prefix: str | None = ""
    """Text put before a query; BGE wants its own sentence here. The empty text stands for the encoder's own prompt for
    queries, where it has one; null puts nothing before a query."""
    query_max_tokens: int | None = Field(None, gt=2)
    """Number of tokens at which a query is cut; default: encoder.max_tokens. The encoder's own max_seq_length counts
    where it is lower. Fewer are quicker, in training and in generate."""
    persona_scale: float | None = Field(None, gt=0)
    """Factor of the persona rows; default: the mean norm of the LLM's token embeddings."""
    instruction_scale: float | None = Field(None, gt=0)
    """Factor of the instruction row; default: the mean norm of the LLM's token embeddings."""
    without_history: bool = False
    """True trains a soft prompt, the control that shows how much of a gain is the task (method plug:soft-prompt). No
    vectors are read; the encoder only decides how wide the plug is. Parts of the shape that read items are left out."""
    label_values: bool = added(False)
    """True adds an embedding of each item's label to the persona, made of the LLM's own token embeddings. Items whose
    label is missing or unknown share a learned value. It needs a task with `target` and `labels`."""
    label_guess: bool = added(False)
    """True has the persona rows spell the labels that the plug takes for likely, in the LLM's own token embeddings, as
    if they stood in the prompt. It needs label_values; a start (fit.start_epochs) teaches what is likely."""
    answer_values: bool = added(False)
    """True has the persona rows spell what the user's items answer: row p adds the LLM's own embedding of the p-th
    token of each item's answer, weighed by the item's likeness to the query and its age. It is made for answers that
    are free text, such as titles, and needs a task with `target`."""
    recency: Literal["none", "position", "time"] = added("none")
    """Learned weights of an item's age. none: as in the paper; position: log of the place counted from the newest item;
    time: position and the log of the days up to the request, or to the newest item where the request has no time or the
    persona depends on the user alone. Users without times have their positions alone."""
    center: Literal["none", "users"] = added("none")
    """Vector that is subtracted from an item's before the projector. users: the mean over the train users, so that the
    projector sees what sets a user apart."""
    token_attention: Literal["shared", "own"] = added("shared")
    """Weights of the items per persona token. shared: one weighting for all tokens, as in the paper; own: each token
    has a learned query of its own beside the request's."""
    request_value: bool = added(False)
    """True adds a projection of the query's vector to the instruction row, so that the plug may say what it knows of
    such requests, whoever asks. A soft prompt of this shape has it too."""
    hidden: int | None = added(None, gt=0)
    """Hidden width of the projectors; default: the width of their output, as in the paper, so that their size grows
    with the square of persona_tokens times the LLM's width."""

    @model_validator(mode="after")
    def _guesses_have_labels(self) -> Self:
        if self.label_guess and not self.label_values:
            raise ValueError("shape.label_guess=true spells labels; set shape.label_values=true as well")
        if self.label_values and self.answer_values:
            raise ValueError(
                "shape.label_values and shape.answer_values both read an item's answer; set the first for a task with "
                "labels, the second for answers that are free text"
            )
        return self


class Config(ResumableConfig):
    """Job `train`: histories, embeddings, requests with targets -> a plug.

    Ray Data gathers each bucket's samples; Ray Train fits the plug, data parallel, the LLM frozen. The loss on train
    users who are held out chooses the checkpoint. A rerun with the same run_id goes on from the last checkpoint.
    Unit of work: a request with a target.
    """

    llm: LLMConfig
    """Frozen LLM that the plug is trained for."""
    encoder: EncoderConfig = EncoderConfig()
    """Encoder, the same as in refresh: its vectors are the history, and a trained copy encodes the query. Vectors named
    by own:NAME have no encoder for queries, so that they need shape.aggregation=mean."""
    plug: str | None = None
    """Folder the plug is written to; default: <run_dir>/plug. It takes the place of a former plug as a whole."""
    shape: PlugShape = PlugShape()
    """Form of the plug."""
    fit: FitConfig = FitConfig()
    """Settings of the training."""
    retrieve: InTraining = added("none")
    """Retrieval that puts items of the user's history into the prompts that are trained on, as `generate` does. Ask
    `generate` for plug+bm25 or plug+recency then, with the same number of items. fit.history_dropout leaves them there.
    """
    retrieval: ShownItems = ShownItems()
    """Number of retrieved items and the room for them, as in `generate`; nothing without `retrieve`."""
    users: str | None = None
    """File with one user id per line: only their requests are learned from."""
    as_of_version: dict[Literal["histories", "requests", "embeddings"], NonNegativeInt] = {}
    """Table versions to read instead of the newest complete one, for example `histories=12`. Any version works until
    `vacuum` removes it."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    max_history_items: int = renamed("history_cap", 512, gt=0)
    """Number of newest items that count."""
    workers: int = Field(1, gt=0)
    """Number of train workers, data parallel."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs of one worker; 1 on a GPU cluster."""
    threads: int | None = Field(None, gt=0)
    """Torch threads of one worker on a CPU; default: the machine's cores shared among the workers."""
    checkpoint_steps: int = Field(0, ge=0)
    """Number of steps between checkpoints; 0 makes one at each epoch's end."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Minutes after which a checkpoint is made between two others; 0 makes none for that. A training that is asked to
    end (SIGTERM) makes one too."""
    max_failures: int = Field(2, ge=0)
    """Number of times that a lost worker group is started again within one run."""
    track: Tracker | None = None
    """Tracker that is shown the loss curves beside TensorBoard, if its library is installed. It reads where it writes
    to from its own environment variables."""

    @model_validator(mode="after")
    def _queries_can_be_encoded(self) -> Self:
        by_query = self.shape.aggregation == "attention" and not self.shape.without_history
        if self.encoder.own is not None and by_query:
            raise ValueError(
                f"shape.aggregation=attention weighs items by the query's vector, and {self.encoder.model} has no "
                "encoder that could make one; set shape.aggregation=mean"
            )
        if self.encoder.own is not None and self.shape.request_value:
            raise ValueError(
                f"shape.request_value=true reads the query's vector, and {self.encoder.model} has no encoder that "
                "could make one; leave it out"
            )
        return self
