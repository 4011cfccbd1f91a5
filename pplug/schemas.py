"""The columns of each table: Arrow schemas, shared by every job.

`bucket` and `user_key` are functions of `user_id` (see `infra.shards`): rows of one user lie together, and the log's
statistics hold `user_key` only, never a user id. Vectors are `list<float32>` with values rounded to 16 bits
(Delta has neither float16 nor a list of fixed size).

A new column that may be null goes into its schema and into `ADDED`: older tables are then read with nulls, and get the
column when they are opened for writing. Any other change raises the table's schema version in `pipelines/tables.py`,
with a step for the job `migrate`.
"""

import pyarrow as pa

_TIME = pa.timestamp("us", tz="UTC")
_VECTOR = pa.list_(pa.float32())
_SHARD = [pa.field("bucket", pa.int32()), pa.field("user_key", pa.string())]
_LAST_ITEM = [
    ("last_item_at", _TIME),  # time of the newest item behind the row; null: the user's items have no times
    ("last_item_position", pa.int64()),  # null: the row is older than these two columns
]
LAST_ITEM = tuple(name for name, _ in _LAST_ITEM)
_CONFIDENCE = [
    ("token_logprobs", pa.list_(pa.float32())),  # of each token of the reply; null: not asked for
    ("label_logprobs", pa.map_(pa.string(), pa.float32())),  # of each label among the labels; null: not asked for
]


def _schema(*fields: tuple[str, pa.DataType], shard: bool = True) -> pa.Schema:
    return pa.schema((_SHARD if shard else []) + [pa.field(name, kind) for name, kind in fields])


HISTORIES = _schema(
    ("user_id", pa.string()),
    ("item_id", pa.string()),
    ("position", pa.int64()),  # order within the user as given
    ("occurred_at", _TIME),  # null: unknown
    ("fields", pa.map_(pa.string(), pa.string())),
    ("text_hash", pa.string()),  # history.text_hash of the fields
)

REQUESTS = _schema(
    ("request_id", pa.string()),
    ("user_id", pa.string()),
    ("owner_id", pa.string()),  # the person; = user_id unless each question has a history of its own
    ("task", pa.string()),
    ("input", pa.string()),
    ("as_of", _TIME),  # null with as_of_position null: the whole history counts
    ("as_of_position", pa.int64()),
    ("target", pa.string()),  # null outside training and evaluation
)

EMBEDDINGS = _schema(
    ("text_hash", pa.string()),
    ("encoder_id", pa.string()),
    ("vector", _VECTOR),  # D values
)

PERSONAS = _schema(
    ("user_id", pa.string()),
    ("n_items", pa.int64()),
    ("last_item_at", _TIME),
    ("history_hash", pa.string()),
    ("encoder_id", pa.string()),
    ("plug_id", pa.string()),  # null: refreshed without a plug
    ("mean_vector", _VECTOR),  # D values, for drift figures only
    ("persona", _VECTOR),  # P*H values, row by row; null without a plug
)

ADAPTERS = _schema(
    ("user_id", pa.string()),
    # <fit_id>-<hash of the weights>, or imported-<hash of weights and alpha>: changes with each of them
    ("adapter_id", pa.string()),
    ("llm_id", pa.string()),
    ("rank", pa.int32()),
    ("alpha", pa.float32()),
    ("targets", pa.list_(pa.string())),
    ("n_examples", pa.int64()),
    ("loss", pa.float32()),  # mean of the last epoch, per target token
    ("history_hash", pa.string()),  # hash of the items that it was trained on
    ("weights", pa.large_binary()),  # safetensors; binary holds 2 GiB in a block, which 50 large adapters exceed
    *_LAST_ITEM,
)

PROFILES = _schema(
    ("user_id", pa.string()),
    ("profile_id", pa.string()),  # hash of the settings, LLM and decoding that made it
    ("text", pa.string()),
    ("n_items", pa.int64()),  # number of items that it could be made from
    ("llm_id", pa.string()),
    ("decoding_id", pa.string()),
    ("history_hash", pa.string()),  # hash of those items
    *_LAST_ITEM,
)

GENERATIONS = _schema(
    ("run_id", pa.string()),
    ("request_id", pa.string()),
    ("method", pa.string()),
    ("user_id", pa.string()),
    ("text", pa.string()),
    ("finish_reason", pa.string()),
    ("prompt_tokens", pa.int32()),
    ("output_tokens", pa.int32()),
    ("persona", pa.string()),  # attention, mean or none
    ("llm_id", pa.string()),
    ("plug_id", pa.string()),
    ("adapter_id", pa.string()),
    ("encoder_id", pa.string()),
    ("decoding_id", pa.string()),
    ("error", pa.string()),  # null: a reply
    *_CONFIDENCE,
    ("sample", pa.int32()),  # place among the replies to one request by one method; null: the only one
    ("input_hash", pa.string()),  # history.input_hash of the request; null: the row is older than this column
)

REJECTS = _schema(
    ("job", pa.string()),
    ("run_id", pa.string()),
    ("key", pa.string()),  # identifies the row in its source
    ("reason", pa.string()),  # a short constant, countable
    ("detail", pa.string()),  # never the user's text
    shard=False,
)

ADDED = {
    "adapters": LAST_ITEM,
    "profiles": LAST_ITEM,
    "generations": (*(name for name, _ in _CONFIDENCE), "sample", "input_hash"),
}
"""Columns that came to a table after the first release of its schema version."""
