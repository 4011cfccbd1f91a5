"""Keys of `adapt`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from datetime import datetime
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.job_config import RequestChoice, ResumableConfig, as_moment
from pipelines.tracking import Tracker
from pplug.adapter import ATTENTION, ExampleRule, LoraConfig, StackConfig
from pplug.llm import LLMConfig
from pplug.settings import added, renamed


class Config(ResumableConfig):
    """Job `adapt`: histories (and requests) -> one adapter per user, many trained together; or the base they stand on.

    stage users: Ray Data spreads users over workers, each of which trains many adapters in one stack. Buckets are
    committed wave by wave as their users are finished. A rerun trains only users whose adapter is missing or whose
    items have changed. The adapter of a user who has no item any more goes. Where there are requests, a user's items
    are cut at the earliest of them: an adapter never knows an item that a request may not see. As requests grow,
    `--requests new` cuts at those that are still to be answered.
    Unit of work: a user.
    stage base: one adapter on the examples of all users but those left out, on Ray Train, merged into a new base model
    folder. Give that folder as llm.model to stage users and to `generate`. Unit of work: an example.

    A base must not know the answers that it is scored on. Best is a population of its own, with other people than those
    who are evaluated (`--cut none` then lets it learn all of their items), or `--users FILE` with the people to be
    evaluated, who are left out. Otherwise the base learns only items that all requests of their user may see (`--cut
    requests`); the targets of requests (`--examples requests`) are always answers. The base's folder records what it
    was made from (made_from.json), and `generate` refuses requests whose answers the base may have learned.
    A rerun with the same run_id goes on with the tables' versions that the run began with, and with no other config.
    """

    stage: Literal["users", "base"] = "users"
    """Kind of training. users: an adapter per user. base: a base model adapted to the task on other people's
    examples."""
    llm: LLMConfig
    """Base model that the adapters stand on."""
    users: str | None = None
    """File with one user id per line. Stage users makes adapters for them (default: all); stage base leaves them
    out."""
    lora: LoraConfig = LoraConfig()
    """Settings of an adapter and its training. By default, lora.shape.targets of a base are all projections of the
    attention (q_proj, k_proj, v_proj, o_proj), as in the paper."""
    epochs: int | None = Field(None, gt=0)
    """Number of passes over the examples. Default: lora.epochs for users; 3 for the base, as in the paper."""
    stack: StackConfig = StackConfig()
    """Number of users who are trained together."""
    rule: ExampleRule = ExampleRule()
    """Settings of how an item becomes an example."""
    max_history_items: int = renamed("history_cap", 10_000, gt=0)
    """Number of newest items of a user to train on."""
    cut: Literal["requests", "none"] = "requests"
    """Items to leave out. requests: those that one of the user's requests may not see, as an evaluation needs. none: no
    item, for requests that are yet to come, or for a base made from other people than those who are evaluated."""
    requests: RequestChoice = added("all")
    """Requests at which stage users cuts. Other than all, adapters are made for users who have such a request, and
    others keep theirs. new: those that no run has answered by a method with an adapter, as a schedule wants it; open:
    those without a target; labelled: those with one."""
    since: datetime | None = added(None)
    """Time from which requests count, by their as_of: a day or a time in ISO form, UTC where it names no zone."""
    changed_only: bool = False
    """True goes on from the existing adapters, for new and changed users. It is refused where base or settings have
    changed."""
    examples: Literal["requests", "items"] = "items"
    """Examples of stage base. items: each item that `cut` lets pass. requests: each request with a target, whose answer
    the base then knows."""
    output: str | None = None
    """Folder of the merged model of stage base; default: <run_dir>/base. It takes the place of a former model as a
    whole."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    workers: int = Field(1, gt=0)
    """Number of training actors: one per GPU, or one per core of a CPU node. A base's run may go on with another
    number; with lora.dropout above 0, the steps from there on draw other masks, as with another seed."""
    min_workers: int | None = Field(None, gt=0)
    """Least number of training actors of stage users. The job starts with it; Ray Data adds others up to `workers`
    while there is work for them and room in the cluster, and takes them away again. Default: workers."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs of one worker; 1 on a GPU cluster."""
    threads: int | None = Field(None, gt=0)
    """Torch threads of one worker on a CPU; default: the machine's cores shared among the workers."""
    batch_users: int = Field(64, gt=0)
    """Number of users handed to a worker at a time; their adapters are in memory together."""
    wave_users: int = Field(2_000, gt=0)
    """Number of users in one commit."""
    max_failures: int = Field(2, ge=0)
    """Number of times that stage base starts a lost worker group again within one run."""
    checkpoint_minutes: float = Field(10.0, ge=0)
    """Minutes after which stage base makes a checkpoint between two others; 0 makes none for that. A training that is
    asked to end (SIGTERM) makes one too."""
    track: Tracker | None = None
    """Tracker that is shown the loss curves of stage base beside TensorBoard, if its library is installed. It reads
    where it writes to from its own environment variables."""

    _since = field_validator("since", mode="before")(as_moment)

    @model_validator(mode="after")
    def _requests_are_cut_at(self) -> Self:
        if (self.requests != "all" or self.since is not None) and (self.stage == "base" or self.cut == "none"):
            raise ValueError(
                "requests and since say where stage users cuts: a base is cut at all requests, and cut=none cuts at "
                "none; leave them out"
            )
        return self

    @property
    def trained(self) -> LoraConfig:
        """The settings of the training that was chosen."""
        if self.stage == "users":
            return self.lora.model_copy(update={"epochs": self.epochs or self.lora.epochs})
        shape = self.lora.shape
        if "targets" not in shape.model_fields_set:
            shape = shape.model_copy(update={"targets": ATTENTION})
        return self.lora.model_copy(update={"epochs": self.epochs or 3, "shape": shape})
