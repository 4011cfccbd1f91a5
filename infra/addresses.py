"""Addresses that the Delta library would take for others: it reads some signs in a table's address as those of a URL.

It makes the table in one place and looks for it in another, where it can never be opened.
"""

import os
import re

from infra.errors import InputError

_ESCAPE = r"%[0-9A-Fa-f]{2}|[\x00-\x1f\x7f]"
_ON_A_DISK, _ON_S3 = re.compile(rf"{_ESCAPE}|\\"), re.compile(rf"{_ESCAPE}|[?#]")


def refuse_misread(address: str) -> None:
    """Refuses the address of a table, or of a folder of tables, that the library would take for another.

    Raises:
        InputError: names the address, and the signs in it.
    """
    is_s3 = address.startswith("s3://")
    if "://" in address and not is_s3 and not address.startswith("file://"):
        return  # no place for tables: what reads it says so
    whole = address if is_s3 else os.path.abspath(os.path.expanduser(address.removeprefix("file://")))
    found = (_ON_S3 if is_s3 else _ON_A_DISK).search(whole)
    if found:
        raise InputError(
            f"{address}: {found[0]!r} in the address of tables has another meaning for the library that reads them, "
            "so that it would not find them again; choose a folder without it"
        )
