"""Replies beside the requests they answer: one bucket, joined by user_id and request_id.

Generations and requests of a user lie in the same bucket: the join needs no shuffle. Two users may call their requests
alike, so an id alone is no key.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import of_bucket, user_key
from infra.snapshot import Snapshot
from pipelines.asked import answers_now
from pipelines.methods import known_parts
from pipelines.owners import Persons

Key: TypeAlias = tuple[str, str]
"""user_id and request_id."""
IDENTITIES = ("llm_id", "plug_id", "decoding_id")
"""Columns that tell which models and decoding a reply is by."""
COSTS = ("prompt_tokens", "output_tokens", "vectors", "stored_persona", "adapters", "profiles")
"""Costs of a reply: tokens of prompt and reply, then each kind of thing that is kept per user and may be read."""


def key(row: Mapping[str, Any]) -> Key:
    """The key of a row that has both columns."""
    return row["user_id"], row["request_id"]


def shown(one: Key) -> str:
    """A request as messages name it: they reach logs, where neither the user's id nor the request's may stand."""
    return f"one of the user with user_key {user_key(one[0])}"


@dataclass(frozen=True)
class Answers:
    """One reply per request and method."""

    texts: dict[str, dict[Key, str]]
    """Texts by method and request; empty for a row with an error."""
    costs: dict[str, dict[Key, tuple[int, ...]]]
    """COSTS by method and request: numbers of tokens, then 1 for each kind of thing that was read, else 0."""
    errors: dict[str, set[Key]]
    """Requests whose reply is an error, by method."""
    cut: dict[str, set[Key]]
    """Requests whose reply ended at the limit of tokens, by method."""


@dataclass(frozen=True)
class Replies(Answers):
    """The requests of a bucket that have a target and were answered in any of the runs, and the answers.

    Of several samples per request the first is told by the fields of `Answers`.
    """

    others: tuple[Answers, ...]
    """The further samples."""
    rows: list[dict[str, Any]]
    """The requests: request_id, user_id, owner_id, target, as_of, as_of_position, and input where it is asked for."""
    labelled: int
    """Requests with a target, answered or not."""
    unknown: list[Key]
    """Keys of replies to requests that the table requests does not have."""
    outdated: list[Key]
    """Keys of replies to an input or with a cut-off that their request no longer has. They are not among the texts."""
    made_by: frozenset[tuple[str, str, str]]
    """Method, column of IDENTITIES and identity of all replies there are."""
    samples: dict[tuple[str, str], int]
    """Number of samples by run and method, as far as this bucket shows it."""

    def people(self, of_several: Persons) -> tuple[int, set[str]]:
        """Number of people who are themselves their one user, and the ids of the others: they have several histories,
        and their requests may lie in many buckets.

        Args:
            of_several: persons with a history under another id than their own (`Owners.of_several`).
        """
        owners = {row["owner_id"] for row in self.rows}
        several = {row["owner_id"] for row in self.rows if row["owner_id"] != row["user_id"]}
        several |= of_several.among(owners)
        return len(owners - several), several


_READ = ("request_id", "user_id", "method", "text", "error", "finish_reason", "prompt_tokens", "output_tokens",
         "persona", "adapter_id", "sample", "run_id", "input_hash")  # fmt: skip
"""Columns of the replies that are read, beside their identities."""


def join_bucket(
    requests: Snapshot,
    generations: Snapshot,
    bucket: int,
    runs: Sequence[str],
    with_input: bool = False,
    users: Mapping[int, list[str]] | None = None,
    methods: Sequence[str] = (),
) -> Replies:
    """Joins the replies of a bucket to their requests.

    Args:
        users: keys by bucket (`shards.keys_by_bucket`); where given, only their requests are joined.
        methods: where given, the requests are those that these methods answered; replies by others are joined too, but
            are not `unknown` or `outdated`: nobody asks.

    Raises:
        ValueError: a request was answered twice by one method, or a user has two requests of one id.
    """
    columns = ["request_id", "user_id", "owner_id", "target", "as_of", "as_of_position"] + ["input"] * with_input
    keys = of_bucket(users, bucket)
    wanted = pc.field("run_id").isin(list(runs))
    rows = generations.read([*_READ, *IDENTITIES], buckets=[bucket], filter=wanted, user_keys=keys)
    tells_input = rows["input_hash"].null_count < len(rows)
    read = [*columns, "input"] if tells_input and not with_input else columns
    everything = requests.read(read, buckets=[bucket], user_keys=keys)
    rows, outdated = _to_inputs_of_now(rows, everything, methods) if tells_input else (rows, [])
    asked = everything.select(columns).filter(pc.is_valid(everything["target"]))
    existing = set(_keys(everything))
    if len(existing) < len(everything):
        twice = next(one for one, times in Counter(_keys(everything)).items() if times > 1)
        raise ValueError(f"request {shown(twice)} stands twice in the table requests; ingest the requests again")
    known, samples = set(_keys(asked)), pc.fill_null(rows["sample"], 0)
    first, *others = (
        _by_method(rows.filter(pc.equal(samples, sample)), known, runs)
        for sample in range(1 + (pc.max(samples).as_py() or 0))
    )
    answered = _answered((first, *others), methods)
    kept = [row for row in asked.to_pylist() if key(row) in answered]
    return Replies(
        first.texts,
        first.costs,
        first.errors,
        first.cut,
        others=tuple(others),
        rows=kept,
        labelled=len(asked),
        unknown=sorted(set(_keys(_by(rows, methods))) - existing, key=lambda one: one[::-1]),
        outdated=outdated,
        made_by=frozenset(
            (row["method"], name, row[name])
            for row in rows.group_by(["method", *IDENTITIES]).aggregate([]).to_pylist()
            for name in IDENTITIES
            if row[name]
        ),
        samples={
            (row["run_id"], row["method"]): 1 + (row["sample_max"] or 0)
            for row in rows.group_by(["run_id", "method"]).aggregate([("sample", "max")]).to_pylist()
        },
    )


def _answered(samples: Sequence[Answers], methods: Sequence[str]) -> set[Key]:
    """The requests that any of these methods answered; any at all where none is named."""
    texts = [one.texts[method] for one in samples for method in one.texts if not methods or method in methods]
    return set[Key]().union(*texts)


def _to_inputs_of_now(rows: pa.Table, requests: pa.Table, methods: Sequence[str]) -> tuple[pa.Table, list[Key]]:
    """The replies to what the requests ask now, and the keys of the others that are by these methods."""
    answers = answers_now(requests)
    told = rows.select(["user_id", "request_id", "input_hash"]).to_pylist()
    counts = pa.array([answers(row) for row in told], pa.bool_())
    outdated = set(_keys(_by(rows.filter(pc.invert(counts)), methods)))
    return rows.filter(counts), sorted(outdated, key=lambda one: one[::-1])


def _by(rows: pa.Table, methods: Sequence[str]) -> pa.Table:
    """Replies by these methods; all where none is named."""
    return rows.filter(pc.is_in(rows["method"], pa.array(methods, pa.string()))) if methods else rows


def _by_method(rows: pa.Table, known: Set[Key], runs: Sequence[str]) -> Answers:
    texts: dict[str, dict[Key, str]] = {}
    costs: dict[str, dict[Key, tuple[int, ...]]] = {}
    errors: dict[str, set[Key]] = {}
    cut: dict[str, set[Key]] = {}
    for row in rows.to_pylist():
        if key(row) not in known:
            continue
        of_method = texts.setdefault(row["method"], {})
        if key(row) in of_method:
            raise ValueError(
                f"request {shown(key(row))} has two replies of method {row['method']} in runs {', '.join(runs)}; "
                "name one run per method, or give --pool when the runs repeat the same methods"
            )
        of_method[key(row)] = row["text"] or "" if row["error"] is None else ""
        costs.setdefault(row["method"], {})[key(row)] = _costs(row)
        if row["error"] is not None:
            errors.setdefault(row["method"], set()).add(key(row))
        elif row["finish_reason"] == "length":
            cut.setdefault(row["method"], set()).add(key(row))
    return Answers(texts, costs, errors, cut)


def _keys(rows: pa.Table) -> list[Key]:
    return list(zip(rows["user_id"].to_pylist(), rows["request_id"].to_pylist(), strict=True))


def _costs(row: Mapping[str, Any]) -> tuple[int, ...]:
    """The values of COSTS."""
    parts = {part.name for part in known_parts(row["method"])}
    return (
        row["prompt_tokens"] or 0,
        row["output_tokens"] or 0,
        int(row["persona"] == "attention" or "dense" in parts),
        int(row["persona"] == "mean"),
        int(row["adapter_id"] is not None),
        int("profile" in parts),
    )
