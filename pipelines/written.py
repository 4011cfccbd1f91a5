"""Workers of a run read what the run has written: each file exists, and has just as many rows."""

from infra.storage import Storage


def read_written(storage: Storage, name: str, rows: int) -> bytes:
    """Bytes of a file that the preparation wrote.

    Raises:
        ValueError: it is not there.
    """
    try:
        return storage.read_bytes(name)
    except FileNotFoundError:
        refuse_another_count(storage, name, rows, None)
        raise


def refuse_another_count(storage: Storage, name: str, written: int, read: int | None) -> None:
    """Raises ValueError when a train worker reads another number of rows than the preparation wrote; None: no file."""
    if read != written:
        found = "no such file" if read is None else f"{read} rows"
        raise ValueError(
            f"{storage.full(name)}: the preparation wrote {written} rows, this train worker finds {found}; give each "
            "run a run_dir that all nodes share, or s3://bucket/prefix, and start no second driver with the same run_id"
        )
