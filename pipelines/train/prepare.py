"""The preparation of a training on the driver: all buckets' samples are written, counted and looked at."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from infra.errors import InputError
from infra.shards import keys_by_bucket
from infra.storage import Storage
from pipelines import tables
from pipelines.train.answers import MAX_TOKENS
from pipelines.train.config import Config
from pipelines.train.examples import Examples
from pipelines.train.samples import PrepareSamples, Shard
from pipelines.waves import each_bucket
from pplug.items import AnswerTokens, KnownAnswers


def prepare(
    config: Config,
    histories: Any,
    embeddings: Any,
    requests: Any,
    task: Any,
    folder: str,
    known: KnownAnswers | None,
    examples: Examples | None,
) -> tuple[dict[str, int], "list[Shard]", list[int]]:
    """Has Ray tasks write the samples of all buckets below `folder`.

    Returns:
        Counts over all buckets, the files that hold samples, and the tokens that answers are spelt with.

    Raises:
        InputError: no sample that may see items shows one, as they lack a field.
    """
    Storage(folder).sweep_drafts()
    asked = tables.read_users(config.users, requests)
    users = keys_by_bucket(asked, tables.open_table(config.tables, "requests").buckets)
    stage = PrepareSamples(
        histories, embeddings, requests, task, config.max_history_items, folder, users, known, config.fit.val_fraction,
        config.fit.seed, examples,
    )  # fmt: skip
    counts = dict.fromkeys(("samples", "held_out", "without_history", "without_vector", "without_times"), 0)
    if examples is not None:
        counts |= {"with_items": 0, "without_examples": 0}
    shards, often, reason = [], Counter[int](), ""
    for row in each_bucket(requests.filled(users), stage):
        often.update(dict(zip(row["tokens"], row["tokens_items"], strict=True)))
        for name in counts:
            counts[name] += row[name]
        reason = reason or row["reason"]
        if row["samples"]:
            shards.append(Shard(row["bucket"], row["samples"], row["vectors"]))
    if reason and counts["without_examples"] == counts["with_items"]:
        raise InputError(
            f"{config.tables}: with retrieve={config.retrieve} none of the {counts['with_items']} samples that may see "
            f"items could show one: {reason} (`retrieval`), or leave retrieve out"
        )
    most = sorted(often, key=lambda token: (-often[token], token))[:MAX_TOKENS]
    return counts, sorted(shards), sorted(most)


def check(config: Config, counts: dict[str, int], answers: KnownAnswers | None, tokens: Sequence[int]) -> None:
    """Refuses samples that the plug cannot learn from, and says on the screen what is missing in others.

    Raises:
        InputError: there are none; all or none of them are of people who are held out; the items have no times, or no
            answers, for a plug that reads these.
    """
    if not counts["samples"] and config.users is not None:
        raise InputError(
            f"users={config.users}: none of these users has a request with a target in {config.tables}; name others, "
            "or leave it out"
        )
    if not counts["samples"]:
        raise InputError(
            f"{config.tables}: no request with a target whose user is there; ingest requests with targets, or use "
            "--derive-requests to make them from the histories"
        )
    _check_held_out(config, counts)
    if counts["without_vector"]:
        print(f"train: {counts['without_vector']} items have no vector yet; run `refresh` to use them", flush=True)
    if counts.get("without_examples"):
        print(
            f"train: {counts['without_examples']} samples show no items in their prompts: an item of the user lacks a "
            "field of the task's `retrieval`",
            flush=True,
        )
    _check_times(config, counts)
    _check_answers(config, answers, tokens)


def _check_held_out(config: Config, counts: dict[str, int]) -> None:
    """Refuses samples that leave nobody to learn from, or nobody to choose the checkpoint by."""
    if 0 < counts["held_out"] < counts["samples"]:
        return
    how_many, left_to, change = (
        ("all", "learn from", "smaller") if counts["held_out"] else ("none", "choose by", "greater")
    )
    raise InputError(
        f"{config.tables}: fit.val_fraction={config.fit.val_fraction:g} is the share of people whose samples choose "
        f"the checkpoint, drawn by a hash of their ids, and {how_many} of the {counts['samples']} samples are of such "
        f"people, so that nobody is left to {left_to}; give more users, or a {change} fit.val_fraction"
    )


def _check_answers(config: Config, answers: KnownAnswers | None, tokens: Sequence[int]) -> None:
    """Refuses a plug that spells answers where no item has any."""
    if isinstance(answers, AnswerTokens) and not tokens:
        raise InputError(
            f"{config.tables}: shape.answer_values=true spells what items answer, but no item has a text in its field "
            f"{answers.field!r}; leave it out, or name another `target` in the task's entry"
        )


def _check_times(config: Config, counts: dict[str, int]) -> None:
    """Refuses a plug that weighs by times where no item has any, and counts the users who have none."""
    if config.shape.recency != "time" or not counts["without_times"]:
        return
    if counts["without_times"] == counts["samples"] - counts["without_history"]:
        raise InputError(
            f"{config.tables}: shape.recency=time weighs items by their age in days, but no user's items all have a "
            "time; ingest them with occurred_at, or set shape.recency=position, which takes their order alone"
        )
    print(
        f"train: {counts['without_times']} samples are of users with an item without a time: the order of their items "
        "alone counts",
        flush=True,
    )
