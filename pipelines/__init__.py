"""The jobs. In every process of theirs, names of models may be addresses (`infra/artifacts.py`)."""

from pathlib import Path

import infra
from pplug import identity


def _fetch(address: str, weights: bool) -> Path:
    from infra import artifacts  # only an address loads the libraries that it takes

    return artifacts.fetch(address, weights)


infra.keep_uv_out()  # before any job imports Ray
identity.fetch_address = _fetch
