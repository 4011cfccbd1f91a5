"""Commands, keys, files, links and targets of make that the project's documents show, and what is wrong with them.

Route: a Markdown file -> fenced blocks and inline code -> command lines, flags, dotted keys, names of files -> each
held against what it stands for: the real command line and configs, the Makefile, the project's files, the headings.
A command in a block is a whole one; inline code may leave out keys that must be given.
"""

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from infra.errors import InputError
from pipelines import options
from pipelines.__main__ import JOBS
from pplug import tasks

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "infra/deploy/*.md", "tests/benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
PROGRAM = "python -m pipelines "
NO_KEYS = frozenset({"config", "set", "help", "debug", "log_json"})
"""Flags of the command line itself."""
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)(?: {4,}.*\n)+)")
_INLINE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SHOWN_FILE = re.compile(r"^cat > (\S+) <<'(\w+)'\n(.*?)^\2$", re.MULTILINE | re.DOTALL)
_ECHOED_FILE = re.compile(r"^echo '([^']*)' > (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """A Markdown file, taken apart."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> "Document":
        return cls(path, path.read_text(encoding="utf-8"))

    @property
    def fences(self) -> list[tuple[str, str]]:
        """Language and content of each fenced block."""
        return _FENCE.findall(self.text)

    def blocks(self, language: str) -> list[str]:
        """Contents of the fenced blocks in a language."""
        return [body for name, body in self.fences if name == language]

    @property
    def prose(self) -> str:
        """The text without fenced and indented blocks."""
        return _INDENTED.sub("", _FENCE.sub("", self.text))

    @property
    def inline(self) -> list[str]:
        """The pieces of inline code, each on one line."""
        return [" ".join(code.split()) for code in _INLINE.findall(self.prose)]

    @property
    def plain(self) -> str:
        """The text without any code."""
        return _INLINE.sub("", self.prose)

    @property
    def lines(self) -> list[str]:
        """Lines of all blocks, continued lines joined, without the content of files that they write."""
        bodies = [body for _, body in self.fences] + _INDENTED.findall(_FENCE.sub("", self.text))
        whole = "\n".join(_SHOWN_FILE.sub("", body) for body in bodies).replace("\\\n", " ")
        return [line.strip() for line in whole.splitlines()]

    @property
    def commands(self) -> list[str]:
        """Every command line in a block, from the program's name on; $NAMES that the document exports are filled in."""
        exported = dict(
            pair.split("=", 1) for line in self.lines if line.startswith("export ") for pair in shlex.split(line)[1:]
        )
        found = [line[line.index(PROGRAM) :].split("#")[0] for line in self.lines if PROGRAM in line]
        return [re.sub(r"\$(\w+)", lambda name: exported.get(name[1], name[0]), line)
                for line in found if "<job>" not in line]  # fmt: skip

    @property
    def mentions(self) -> list[str]:
        """Commands in inline code, with or without the program's name."""
        found = [code.removeprefix(PROGRAM) for code in self.inline]
        named = [code.startswith(PROGRAM) for code in self.inline]
        return [
            f"{PROGRAM}{code}"
            for code, whole in zip(found, named, strict=True)
            if whole or (code.split()[0] in JOBS and " --" in code)
        ]

    @property
    def shown_files(self) -> dict[str, str]:
        """Files that the document writes: name -> content."""
        shown = {name: content for body in self.blocks("bash") for name, _, content in _SHOWN_FILE.findall(body)}
        return shown | {name: content for body in self.blocks("bash") for content, name in _ECHOED_FILE.findall(body)}

    @property
    def made_files(self) -> set[str]:
        """Files that commands of the document write, a config and a task, and those that its Python writes."""
        names = [re.search(r"--write-config (\S+)", line) for line in self.commands]
        stems = [found[1].removesuffix(".yaml") for found in names if found]
        by_python = re.findall(r'Path\("([^"]+)"\)\.write_text', "\n".join(self.blocks("python")))
        return {f"{stem}{end}" for stem in stems for end in (".yaml", "-task.yaml")} | set(by_python)

    @property
    def anchors(self) -> set[str]:
        """Names of the headings as the usual hosts make them."""
        found: set[str] = set()
        for heading in re.findall(r"^#+ +(.+?)\s*$", self.prose, re.MULTILINE):
            shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
            name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
            found.add(name if name not in found else f"{name}-{sum(one.startswith(name) for one in found)}")
        return found

    def section(self, heading: str) -> "Document":
        """The part from a heading to the next one."""
        _, found, rest = self.text.partition(f"\n{'#' * 2} {heading}\n")
        assert found, f"{self.path}: no section {heading}"
        return Document(self.path, re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0])

    def table(self, first: str) -> list[str]:
        """The first column of the table whose first column is named so, code marks taken off."""
        lines = self.text.splitlines()
        rows = lines[next(at for at, line in enumerate(lines) if line.startswith(f"| {first} |")) + 2 :]
        cells = []
        for row in rows:
            if not row.startswith("|"):
                break
            cells.append(row.split("|")[1].strip().strip("`"))
        return cells


# --- what is wrong ----------------------------------------------------------------------------------------------------


def wrong_commands(document: Document, folder: Path) -> Iterator[str]:
    """Command lines that the real command line would not take. `folder`: an empty one, for files that are shown."""
    for name, content in document.shown_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    for line, whole in [(one, True) for one in document.commands] + [(one, False) for one in document.mentions]:
        _, _, _, job, *words = shlex.split(line)
        if job == "--help":
            continue
        if job not in JOBS:
            yield f"{line}: there is no job {job}"
        elif "--help" not in words:
            configs = [at for at, word in enumerate(words[:-1]) if word == "--config"]
            made = [at for at in configs if words[at + 1] in document.made_files]
            for at in made:  # its content is not known before the command has run
                words, whole = words[:at] + words[at + 2 :], False
            yield from (f"{line}: {problem}" for problem in _refused(job, words, whole, folder))


def _refused(job: str, words: list[str], whole: bool, folder: Path) -> Iterator[str]:
    words = list(words)
    for at, word in enumerate(words[:-1]):
        if word == "--config":
            places = [base / words[at + 1] for base in (folder, ROOT)]
            there = [place for place in places if place.is_file()]
            if not there:
                yield f"there is no file {words[at + 1]}"
                return
            words[at + 1] = str(there[0])
    config = JOBS[job].config
    try:
        options.check(config, options.read(words, config))
    except InputError as error:
        left_out = () if whole else (": missing, expected", "needs a value")
        yield from (text for text in str(error).splitlines() if not any(words in text for words in left_out))


@functools.cache
def known_keys() -> frozenset[str]:
    """Dotted keys of all jobs and their groups."""
    keys = {key for job in JOBS.values() for key, *_ in options.fields_of(job.config)}
    return frozenset(".".join(key[:end]) for key in keys for end in range(1, len(key) + 1))


@functools.cache
def known_choices() -> dict[str, frozenset[str]]:
    """Dotted keys that take one of a few words in every job that has them, and these words."""
    found: dict[str, set[str] | None] = {}
    for job in JOBS.values():
        for key, annotation, *_ in options.fields_of(job.config):
            name, words = ".".join(key), _choices(annotation)
            before = found.get(name, set())
            found[name] = None if words is None or before is None else before | words
    return {name: frozenset(words) for name, words in found.items() if words}


def _choices(annotation: Any) -> set[str] | None:
    """The words of a Literal, None beside it or not; None for other types."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _choices(inner[0])
    if origin is Literal:
        return set(inner) if all(isinstance(word, str) for word in inner) else None
    if origin in (Union, UnionType):
        parts = [_choices(part) for part in inner if part is not NoneType]
        return None if None in parts else {word for words in parts for word in words or ()}
    return None


def wrong_keys(document: Document) -> Iterator[str]:
    """Flags and dotted keys in inline code that no job has, and words that a key does not take.

    A piece of inline code that begins with another program's name is not read; `wrong_commands` reads whole commands.
    """
    for code in document.inline:
        words = _words(code)
        if not (words[0].startswith("--") or "=" in words[0] or len(words) == 1):
            continue
        last, flag = "", ""
        for word in words:
            if word.startswith("--"):
                last, _, value = word[2:].partition("=")
                flag = last.replace("-", "_")
                if flag not in known_keys() and flag not in NO_KEYS:
                    yield f"{code}: no job has --{last}"
                if value:
                    yield from _wrong_value(code, flag, value)
            elif flag in ("", "set"):
                yield from _wrong_pair(code, *word.partition("="), sure=flag == "set")
            else:
                yield from _wrong_value(code, flag, word)
                flag = "a value"  # what else stands behind the flag is no value of it


def _words(code: str) -> list[str]:
    try:
        return shlex.split(code) or [code]
    except ValueError:  # a quotation mark alone
        return code.split()


def _wrong_pair(code: str, key: str, equals: str, value: str, *, sure: bool) -> Iterator[str]:
    """`sure`: it stands behind --set; elsewhere a word in inline code is a key if a dot follows the name of a group."""
    groups = {name.partition(".")[0] for name in known_keys() if "." in name}
    is_key = re.fullmatch(r"\w+(\.\w+)+", key) and key.partition(".")[0] in groups
    if (sure or is_key) and key not in known_keys() and not key.endswith((".yaml", ".py")):
        yield f"{code}: no job has {key}"
    elif equals:
        yield from _wrong_value(code, key, value)


def _wrong_value(code: str, key: str, value: str) -> Iterator[str]:
    choices = known_choices().get(key)
    if choices and value not in choices and not value.isupper():  # NAME stands for any
        yield f"{code}: {key} takes {', '.join(sorted(choices))}"


def wrong_yaml(document: Document) -> Iterator[str]:
    """Task entries that the code refuses; other files that are shown are read with the commands that name them."""
    for name, content in document.shown_files.items():
        found = yaml.safe_load(content) if name.endswith(".yaml") else None
        if isinstance(found, dict) and ("metric" in found or ("name" in found and {"text", "item"} & found.keys())):
            try:
                tasks.TaskSpec.model_validate(found)
            except ValueError as error:
                yield f"{name}: {error}"


def wrong_targets(document: Document) -> Iterator[str]:
    """Targets of make that the Makefile does not have."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in [*document.inline, *document.lines]:
        for target in re.findall(r"(?:^|[ ,])make ([a-z][a-z-]*)", code):
            if target not in targets:
                yield f"{code}: the Makefile has no {target}"


def wrong_links(document: Document) -> Iterator[str]:
    """Links to files that are not there, and to headings that the file does not have."""
    for target in _LINK.findall(document.prose):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        place = (document.path.parent / name).resolve() if name else document.path
        if not place.exists():
            yield f"{target}: there is no such file"
        elif anchor:
            other = document if place == document.path else Document.read(place)
            if anchor not in other.anchors:
                yield f"{target}: no such heading; there are {', '.join(sorted(other.anchors))}"


def wrong_files(document: Document) -> Iterator[str]:
    """Names of YAML and Python files in code that are neither in the project nor written by the document."""
    ours = [
        str(path.relative_to(ROOT))
        for place in ("*.yaml", "pplug", "infra", "pipelines", "tests", "docs")
        for path in (ROOT.glob(place) if "*" in place else (ROOT / place).rglob("*"))
    ]
    written = {*document.shown_files, *document.made_files}
    for code in [*document.inline, *document.lines]:
        for name in re.findall(r"(?<![\w<>/*.:-])[\w][\w./-]*\.(?:yaml|py)\b", code):
            if name not in written and not any(f"/{one}".endswith(f"/{name}") for one in ours):
                yield f"{code}: there is no file {name}"
