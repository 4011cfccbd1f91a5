"""The files of a source: what is data, in which format, and what is left out and why.

A source is one address or several: a file, a folder, a pattern (`data/2024-*/*.csv`, `**` for any depth), on a local
disk, on S3 or at any address that `infra/remote.py` reads. Files are read in the order of the addresses, and within one
by name; a file that two addresses name is read once.

Not data: names that begin with `.` or `_` (a folder `_x=1` of a partition is data), and names that end in .tmp, .crc,
.part, ~ or ._COPYING_. A folder with a `_delta_log` or with Iceberg's metadata is one table, read through these. Hudi
tables are refused: their data files hold deleted rows too.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote

from fsspec.utils import glob_translate

from infra.errors import InputError
from infra.remote import reading
from infra.storage import Storage

HIDDEN, OTHER_KIND = "hidden or temporary", "another kind of file"
PACKINGS = (".gz", ".zst", ".bz2", ".xz")
"""Ends of names of compressed files; what a file is, its first bytes say."""
_TEMPORARY = (".tmp", ".crc", ".part", "~", "._copying_")
_MAGIC = re.compile(r"[*?\[]")
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_DELTA, _HUDI = "_delta_log", ".hoodie"
_ICEBERG = re.compile(r"(?:^|(?P<root>.*)/)metadata/[^/]+\.metadata\.json$")
_TABLES = ("delta", "iceberg")
SHOWN = 5
"""Number of names that a message lists."""


@dataclass(frozen=True)
class File:
    """One file of a source, or one table that is read through its log."""

    folder: str
    name: str
    """Path relative to the folder. A table is named by its own folder."""
    format: str
    size: int = 0
    """Size in bytes, as it lies there; 0 for a table."""
    partition: tuple[tuple[str, str | None], ...] = ()
    """Columns that the names of its folders give (`day=2024-01-01/`), as text."""

    @property
    def address(self) -> str:
        return reading(self.folder).full(self.name)


@dataclass(frozen=True)
class Source:
    """Everything found for one source."""

    files: tuple[File, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    """Address and reason of each file that is not read."""

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats found, each once, in the order of reading."""
        return tuple(dict.fromkeys(file.format for file in self.files))

    def left_out_in_words(self) -> str | None:
        """Counts the files that are not read, and names some; None where all are read."""
        if not self.left_out:
            return None
        counts = Counter(reason for _, reason in self.left_out)
        named = {
            reason: ", ".join([address for address, why in self.left_out if why == reason][:SHOWN]) for reason in counts
        }
        more = {reason: f" and {n - SHOWN} more" if n > SHOWN else "" for reason, n in counts.items()}
        parts = [f"{n} of {reason} ({named[reason]}{more[reason]})" for reason, n in counts.items()]
        return f"{len(self.left_out)} files are left out: {'; '.join(parts)}"


@dataclass(frozen=True)
class Kinds:
    """Names of files by which formats are told apart; `base.FORMATS` gives it."""

    suffixes: Mapping[str, tuple[str, ...]]
    """Ends of file names by format, in lower case and without the end of a packing."""
    beside: frozenset[str] = frozenset()
    """Formats whose files are left out of a folder where another format has files: notes about the data."""
    aloof: frozenset[str] = frozenset()
    """Formats that are read only when they are named."""

    def of(self, name: str) -> str | None:
        """Returns the format that a file's name tells; None for another kind."""
        bare = unpacked_name(name)
        return next((format for format, ends in self.suffixes.items() if bare.endswith(ends)), None)


def unpacked_name(name: str) -> str:
    """Returns a file's name in lower case, without the end that a packing or a web address's query adds."""
    bare = name.partition("?")[0].lower()
    end = next((packing for packing in PACKINGS if bare.endswith(packing)), "")
    return bare.removesuffix(end)


def addresses(source: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns the addresses of a source that is given as one text or as several."""
    return () if source is None else (source,) if isinstance(source, str) else tuple(source)


def discover(source: str | Sequence[str], kinds: Kinds, format: str = "auto") -> Source:
    """Finds the files of a source, in the order of reading; names, sizes and first bytes are looked at.

    Raises:
        InputError: nothing is there, no file is of a known kind, a folder holds files of several kinds and `format`
            is auto, or a folder is a table of a kind that cannot be read.
    """
    found: list[File] = []
    left: dict[str, str] = {}
    for address in addresses(source):
        files, others = _at_address(address, kinds, format)
        found += files
        left |= others
    once = tuple({file.address: file for file in reversed(found)}.values())[::-1]
    return Source(
        _distinct(once), tuple((name, why) for name, why in left.items() if name not in {f.address for f in once})
    )


def _at_address(address: str, kinds: Kinds, format: str) -> tuple[list[File], dict[str, str]]:
    folder, name = _apart(address)
    parent = reading(folder)
    whole = parent.join(name) if name else parent
    if name and parent.is_file(name):
        return [_single(parent, name, kinds, format)], {}
    if whole.exists(_DELTA):
        return [_table(whole, "delta")], {}
    if not whole.exists() and _MAGIC.search(address):
        base, pattern = _pattern(address)
        storage = reading(base)
        matches = re.compile(glob_translate(pattern)).match
        names = {
            name: size for name, size in _listed(storage).items()
            if any(matches(name[:end]) for end in (*(m.start() for m in re.finditer("/", name)), len(name)))
        }  # fmt: skip
        if not names:
            raise InputError(f"{address}: no file has such a name; check the pattern and the folder {storage.uri}")
    else:
        storage, names = whole, _listed(whole)
        if not names:
            why = "the folder is empty" if whole.exists() else "it does not exist"
            raise InputError(f"{address}: no file is there ({why}); expected a file, a folder of files or a pattern")
    return _of_folder(address, storage, names, kinds, format)


def _of_folder(
    address: str, storage: Storage, names: Mapping[str, int], kinds: Kinds, format: str
) -> tuple[list[File], dict[str, str]]:
    _refuse_tables(storage, names)
    roots = {name.partition(f"/{_DELTA}/")[0]: "delta" for name in names if f"/{_DELTA}/" in name}
    roots |= {match["root"] or "": "iceberg" for name in names if (match := _ICEBERG.match(name))}
    if "" in roots:  # the folder itself
        return [_table(storage, roots[""])], {}
    loose = {name: size for name, size in names.items() if not any(name.startswith(f"{root}/") for root in roots)}
    left = {storage.full(name): HIDDEN for name in loose if is_hidden(name)}
    data = {name: size for name, size in loose.items() if not is_hidden(name)}
    known = {name: kinds.of(name) for name in data}
    counts = Counter(kind for kind in known.values() if kind is not None and kind not in kinds.aloof)
    counts.update(roots.values())
    chosen = _chosen(address, +counts, kinds, format)
    files = [_table(storage.join(root), chosen) for root, kind in roots.items() if kind == chosen]
    if chosen in _TABLES:
        chosen_names: list[str] = []
    elif format != "auto" and not counts[format]:  # files without a name that tells, such as u.data
        chosen_names = [name for name, kind in known.items() if kind is None or kind == format]
    else:
        chosen_names = [name for name, kind in known.items() if kind == chosen]
    files += [File(storage.uri, name, chosen, data[name], _partition(name)) for name in chosen_names]
    left |= {storage.full(name): OTHER_KIND for name in data.keys() - set(chosen_names)}
    if not files:
        listed = sorted(data) or sorted(names)
        raise InputError(
            f"{address}: no file of a known kind is there (it has {', '.join(listed[:SHOWN])}"
            f"{f' and {len(listed) - SHOWN} more' if len(listed) > SHOWN else ''}); expected names that end in "
            f"{', '.join(end for ends in kinds.suffixes.values() for end in ends)}, or give --format"
        )
    return sorted(files, key=lambda file: file.name), left


def _chosen(address: str, counts: Mapping[str, int], kinds: Kinds, format: str) -> str:
    """Returns the one format that a folder is read in. Raises InputError: it could be several."""
    if format != "auto":
        return format
    main = [kind for kind in counts if kind not in kinds.beside] or list(counts)
    if len(main) > 1:
        said = ", ".join(f"{counts[kind]} of {kind}" for kind in main)
        raise InputError(
            f"{address}: files of several formats are there ({said}), and reading one of them would leave out the "
            "others: name the format with --format, or the files with a pattern such as 'folder/*.csv'"
        )
    return main[0] if main else ""


def is_hidden(name: str) -> bool:
    """Says whether a path below a source is no data by its name: hidden, a mark of a job, or half written."""
    parts = name.split("/")
    return any(part.startswith(".") or part.startswith("_") and "=" not in part for part in parts) or parts[
        -1
    ].lower().endswith(_TEMPORARY)


def _refuse_tables(storage: Storage, names: Iterable[str]) -> None:
    """Raises InputError: files belong to a table whose log cannot be read here."""
    for name in names:
        if f"/{_HUDI}/" in f"/{name}":
            root = name.partition(_HUDI)[0].rstrip("/")
            raise InputError(
                f"{storage.full(root)} is a Hudi table: its data files hold rows that have been deleted, and only "
                "its metadata says which. Read its present rows with a reader of Hudi tables and hand them over "
                "from Python with ingest_frame(reader, ...), as docs/python.md shows; or write them to Parquet first"
            )


def _single(parent: Storage, name: str, kinds: Kinds, format: str) -> File:
    """A file that was named itself: its name or its content says the format."""
    told = kinds.of(name)
    found = format if format != "auto" else told if told and told not in kinds.aloof else _by_content(parent, name)
    return File(parent.uri, name, found, parent.size(name) or 0)


def _by_content(parent: Storage, name: str) -> str:
    with parent.open_input(name) as stream:
        first = bytes(stream.read(4096))
    if first[:4] == b"PAR1":
        return "parquet"
    packed = first[:2] in (b"\x1f\x8b", b"BZ") or first[:4] in (b"\x28\xb5\x2f\xfd", b"\xfd7zX")
    if first.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return "json"
    raise InputError(
        f"{parent.full(name)}: neither its name nor its first bytes tell a format"
        f"{' (it is compressed)' if packed else ''}; name one with --format, such as --format csv"
    )


def _table(root: Storage, format: str) -> File:
    folder, name = _apart(root.uri)
    return File(folder, name, format)


def _listed(storage: Storage) -> dict[str, int]:
    return {name: facts.size for name, facts in storage.facts().items()}


def _apart(address: str) -> tuple[str, str]:
    """Splits an address into its folder and its last name; a bucket alone has no name."""
    scheme, mark, path = address.rstrip("/").rpartition("://")
    bare, asked, query = path.partition("?") if scheme.startswith("http") else (path, "", "")
    above, _, last = bare.rpartition("/")
    if mark and not above:  # s3://bucket
        return f"{scheme}{mark}{path}", ""
    return (
        f"{scheme}{mark}{above}" if mark or above else "/" if bare.startswith("/") else "."
    ), f"{last}{asked}{query}"


def _pattern(address: str) -> tuple[str, str]:
    """Splits an address into the folder before its first wildcard and the pattern below."""
    parts = address.split("/")
    first = next(at for at, part in enumerate(parts) if _MAGIC.search(part))
    base = "/".join(parts[:first])
    return base or ("/" if address.startswith("/") else "."), "/".join(parts[first:])


def _partition(name: str) -> tuple[tuple[str, str | None], ...]:
    pairs = [part.partition("=") for part in name.split("/")[:-1]]
    return tuple((key, None if value == _NO_VALUE else unquote(value)) for key, mark, value in pairs if mark and key)


def _distinct(files: tuple[File, ...]) -> tuple[File, ...]:
    """Lengthens names by their folders where files of two folders have one name: a reject names a file by it."""
    for _ in range(100):
        twice = {name for name, n in Counter(file.name for file in files).items() if n > 1}
        above = [(_apart(file.folder) if file.name in twice else ("", "")) for file in files]
        if not any(last for _, last in above):
            break
        files = tuple(
            replace(file, folder=folder, name=f"{last}/{file.name}") if last else file
            for file, (folder, last) in zip(files, above, strict=True)
        )
    return files
