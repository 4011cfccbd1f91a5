"""Exports one user's adapter as a PEFT folder: users own their adapter."""

from pathlib import Path

import pyarrow.compute as pc

from infra.errors import InputError
from infra.shards import bucket_of, user_key
from infra.table import Table
from pipelines.model_folders import check_output, whole_output
from pplug.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterShape, base_shapes, from_bytes, write_folder


def export_adapter(adapters: Table, user_id: str, output: str | Path, base: Path, llm_id: str) -> str:
    """Writes adapter_model.safetensors and adapter_config.json; returns the adapter's id.

    The folder takes the place of a former adapter as a whole.

    Args:
        adapters: table of adapters; only the user's rows of its newest complete version are read.
        base: folder of the model that the adapter was trained on; the adapter's config names it.
        llm_id: identity of the LLM that the adapters were trained on.

    Raises:
        InputError: the user has no adapter, it belongs to another base, or the folder holds other files.
    """
    check_output("output", output, (CONFIG_FILE, WEIGHTS_FILE))
    mine = pc.field("user_key") == user_key(user_id)
    columns = ["adapter_id", "rank", "alpha", "targets", "weights"]
    snapshot = adapters.snapshot(complete=True)
    rows = snapshot.read(columns, buckets=[bucket_of(user_id, adapters.buckets)], filter=mine).to_pylist()
    if not rows:
        raise InputError(f"{adapters.uri}: no adapter of this user in version {snapshot.version}; run `adapt` first")
    row = rows[0]
    shape = AdapterShape(targets=tuple(row["targets"]), rank=row["rank"], alpha=row["alpha"])
    try:
        from_bytes(row["weights"] or b"", shape, base_shapes(base, shape.targets), llm_id)
    except ValueError as error:
        raise InputError(f"{adapters.uri}: {error}") from error
    try:
        with whole_output(output, (CONFIG_FILE, WEIGHTS_FILE)) as draft:
            write_folder(draft, row["weights"], shape, str(base))
    except ValueError as error:
        raise InputError(f"output: {error}") from error
    return row["adapter_id"]
