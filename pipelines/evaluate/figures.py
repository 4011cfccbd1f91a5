"""The figures of an evaluation, typed: report.json is their dump, and page, charts and screen read them.

Scores, shares and differences are fractions (0.816 is 81.6%) or in the unit of the metric; a difference is always the
method minus the other one, so that a lower error is a negative difference. `ci95` is the middle 95% of resamples over
people, one figure by itself; `ci95_corrected` holds for all methods at once. Scores that cannot be told are nan.
"""

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipelines.evaluate.config import EvaluateConfig

BASELINE = "none"
"""The method without personalisation; gains are differences to it."""
Interval = tuple[float, float]
"""Low and high end."""


def _absent(value: Any) -> bool:
    return value is None


ABSENT: Any = Field(default=None, exclude_if=_absent)
"""Default of a field that report.json leaves out where there is nothing to tell."""


class Figures(BaseModel):
    """Base of the models: a key that is not known is a mistake."""

    model_config = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True)

    def dump(self) -> dict[str, Any]:
        """The same as plain values, with the keys of report.json."""
        return self.model_dump(by_alias=True)


# --- one method -------------------------------------------------------------------------------------------------------


class Gain(Figures):
    """A method's score minus that of the method `none` on the same requests, in the unit of the metric."""

    difference: float
    ci95: Interval
    p_value: float | None
    """Two-sided, from the resampled differences; null of fewer than six people."""
    ci95_corrected: Interval | None = ABSENT
    """Absent for controls and the oracle, which nobody claims to help, and where one person alone was asked."""

    @property
    def interval(self) -> Interval:
        """The interval that holds for all methods at once where the method is one of several, else its own."""
        return self.ci95_corrected or self.ci95


class Share(Figures):
    """A share of the users, from 0 to 1."""

    share: float
    ci95: Interval


class UserShares(Figures):
    """Users who do better, worse and as well as with the method `none`, over all their requests.

    A person with one history per question counts once per question.
    """

    n: int
    """Users that are compared, once per repeat of the method; 0 where `none` was not scored."""
    better: Share
    worse: Share
    equal: Share


class UnclearReply(Figures):
    """A reply that is no answer of the task."""

    user_id: str
    """The user's id stands here so that `erase` finds the reply."""
    text: str
    """The first characters, on one line."""


class NotUnderstood(Figures):
    """Replies that are no answer of the task and count as wrong."""

    n: int
    share: float
    """Share of the replies without an error, from 0 to 1."""
    replies: list[UnclearReply]
    """A few of these replies, all different."""


class Cost(Figures):
    """Cost of a method, on average."""

    prompt_tokens: float
    """Tokens per request."""
    output_tokens: float
    """Tokens per request."""
    seconds_per_reply: float | None
    """Seconds; None where several methods shared the engine's time."""
    bytes_per_user: int | float | None
    """Bytes that the method reads of a user beside the history; None where the size is not known."""


class MethodFigures(Figures):
    """The figures of one method. Where runs were pooled, n, errors and users count every repeat."""

    n: int
    """Replies."""
    scores: dict[str, float]
    """Score by metric."""
    ci95: dict[str, Interval]
    """The scores' intervals by metric."""
    errors: int
    """Replies that were errors; they count as empty predictions."""
    not_understood: NotUnderstood | None
    """None where any text is an answer, or where every reply is an error."""
    cut_at_the_limit: int
    """Replies that ended at the limit of tokens."""
    cost: Cost
    vs_none: dict[str, Gain] | None = ABSENT
    """Gain by metric; absent for `none` itself and where `none` was not scored."""
    users_vs_none: UserShares | None = ABSENT
    """Absent where `vs_none` is."""

    @property
    def users_compared(self) -> UserShares | None:
        """The users better and worse off, where there are users to compare."""
        return self.users_vs_none if self.users_vs_none and self.users_vs_none.n else None


class ReferenceFigures(Figures):
    """Scores of a reference that needs no LLM, on the same requests."""

    scores: dict[str, float]
    ci95: dict[str, Interval]
    about: str = ""
    """Sentence that says what the reference is."""


# --- groups of users --------------------------------------------------------------------------------------------------


class CohortScore(Figures):
    """One method's score in one cohort, by the first metric."""

    score: float
    ci95: Interval
    difference: float | None = ABSENT
    """Score minus that of `none`; absent for `none` itself and where `none` was not scored."""
    difference_ci95: Interval | None = ABSENT


class Cohort(Figures):
    """One third of the requests, by a fact about their users."""

    low: float = Field(alias="from")
    """Smallest value, in the unit of its `Cohorts`."""
    high: float = Field(alias="to")
    """Greatest value, in the unit of its `Cohorts`."""
    n: int
    """Requests; a method that was repeated has several replies to each."""
    methods: dict[str, CohortScore]


class Cohorts(Figures):
    """The thirds by one fact. Equal values stay together, so that thirds may differ in size or be missing."""

    unit: str
    """Unit of the fact: items, days, or 1 - cosine."""
    metric: str
    unknown: int
    """Requests whose user has no such fact; they are in no third."""
    thirds: list[Cohort]


# --- the verdict ------------------------------------------------------------------------------------------------------


class Difference(Figures):
    """A method's score minus another's, with an interval that holds for all pairs of its kind at once."""

    difference: float
    ci95_corrected: Interval

    @property
    def known_interval(self) -> Interval | None:
        """The interval; None where there is none, as of one person."""
        return self.ci95_corrected if all(map(math.isfinite, self.ci95_corrected)) else None


class ControlDifference(Difference):
    """The best method minus one of its controls."""

    kind: str
    """Replacement for the user in this control: other-user, no-history, soft-prompt or none (no adapter)."""
    keeps: list[str]
    """Parts of the method that are still the user's own in the control."""


class BestReference(Difference):
    """The best reference without an LLM, and the best method minus it."""

    name: str
    score: float
    """The reference's own score."""
    beaten: bool
    """True where the interval lies on the method's side of zero."""


class MostUnclear(Figures):
    """The method with the greatest share of replies that are no answer."""

    method: str
    share: float
    """From 0 to 1."""


class Judgement(Figures):
    """The verdict as data. What cannot be told is None or empty."""

    metric: str
    n_methods: int
    """Methods that may be claimed to help: neither the baseline, nor a control, nor told the truth."""
    n_users: int
    """People."""
    best: str | None = None
    """The one of these methods with the best score."""
    words: str | None = None
    """The words on the best method."""
    gain: Difference | None = None
    """The best method minus `none`."""
    control: str | None = None
    """The best of the best method's controls."""
    controls: dict[str, ControlDifference] = {}
    """All controls of the best method."""
    reference: BestReference | None = None
    methods: dict[str, str] = {}
    """Words by method."""


class Verdict(Judgement):
    """The verdict with its words."""

    not_understood: MostUnclear | None
    """None where no method has many such replies."""
    headline: str
    because: list[str]
    """Sentences that say why."""


# --- the whole --------------------------------------------------------------------------------------------------------


class ExampleReply(Figures):
    """One method's reply to an example."""

    method: str
    text: str
    right: bool
    """True for the right answer; never true where the task asks for a text."""


class Example(Figures):
    """A request with the replies of all methods side by side."""

    input: str
    target: str
    replies: list[ExampleReply]


class KnownScores(Figures):
    """The best possible scores by the first metric, where the truth is known; further keys are kept as they are."""

    model_config = ConfigDict(extra="allow")

    best_without_history: float
    best_with_history: float
    other_user: float | None = ABSENT
    """Score to expect with another user's history."""


class Evaluation(Figures):
    """The figures of an evaluation, as report.json has them."""

    task: str
    n_users: int
    """People who asked the requests."""
    n_requests: int
    """Requests that have a target and were answered."""
    not_generated: int
    """Requests that have a target and were not answered."""
    verdict: Verdict
    methods: dict[str, MethodFigures]
    references: dict[str, ReferenceFigures]
    """Figures of what needs no LLM; they count as no method."""
    groups: dict[str, Cohorts]
    """Thirds of the requests by length, age and distance, where these are known."""
    warnings: list[str]
    runs: list[str] = []
    """run_ids of generate."""
    reference: KnownScores | None = None
    by_run: dict[str, dict[str, dict[str, float]]] | None = ABSENT
    """Scores by run, method and metric where runs were pooled."""
    predictions: dict[str, str] | dict[str, dict[str, str]] = {}
    """Address of the predictions by method; where runs were pooled, by run and method."""
    examples: list[Example] | None = ABSENT
    identities: dict[str, str | None] = {}
    """Models and decoding that the replies are by."""
    unlike_baseline: dict[str, list[str]] = {}
    """Methods by another LLM or decoding than `none`, with the identities that differ: llm_id, decoding_id."""

    classifier_items: int = 0
    """Items that the classifier among the references was trained on; 0 where there is none."""

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics; the verdict goes by the first."""
        return list(next(iter(self.methods.values())).scores)


class Report(Evaluation):
    """report.json of evaluate, as far as the page shows it: the figures and the facts of the run."""

    model_config = ConfigDict(extra="ignore")

    run_id: str
    started_at: str
    config: EvaluateConfig
    references_from: dict[str, dict[str, int]] = {}
    """Version by place of other populations' tables and by table, from which the classifier learned too."""
    tables_read: dict[str, int]
    """Version by table."""
    versions: dict[str, str]
    """Version by library."""


# --- comparisons ------------------------------------------------------------------------------------------------------


class Change(Figures):
    """A method's score in two runs, by one metric."""

    earlier: float
    later: float
    difference: float
    """Later minus earlier."""
    ci95: Interval
    ci95_corrected: Interval | None = ABSENT
    """The interval that holds for all methods that are compared at once; absent where one person alone was asked."""
    p_value: float | None
    """As in `Gain`."""

    @property
    def interval(self) -> Interval:
        """As in `Gain`."""
        return self.ci95_corrected or self.ci95


class Comparison(Figures):
    """Two runs of generate on the requests that both answered."""

    task: str
    runs: list[str]
    """run_ids, the earlier first."""
    n_requests: int
    n_users: int
    """People who asked the requests."""
    methods: dict[str, dict[str, Change]]
    """Change by method and metric; methods of one run alone are not here."""
    left_out: dict[str, int]
    """Requests by run that the other run has not answered."""
    warnings: list[str]


class PersonaDrift(Figures):
    """Cosine distances (0 to 2) that users have moved between two versions of the table personas."""

    versions: list[int]
    """The earlier first."""
    threshold: float
    """Cosine distance above which a user counts as moved."""
    users: int
    """Users with a vector in both versions."""
    gone: int
    """Users of the earlier version alone."""
    new: int
    """Users of the later version alone."""
    mean: float | None = ABSENT
    """Absent, as the following ones, where no user is in both versions."""
    median: float | None = ABSENT
    p95: float | None = ABSENT
    share_above: float | None = ABSENT
    """Share of these users above the threshold, from 0 to 1."""
