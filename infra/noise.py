"""The lines of a job's output that a person is shown; job.log has all of them.

Lines of this process are shown unless a library says them below the level of an error. Lines of Ray's workers, which
Ray prints here behind `(name pid=7)`, are shown if they are the job's own or look like an error: workers say much else.
The frames of a traceback and the words of its error are not shown, since those may quote a user's text. The words may
take several lines: they end where a line of the same source is the job's own, has a level, begins a warning or says how
a process ended.
"""

import re

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_WORKER = re.compile(r"\((?:(?:.*? )?pid=\d+(?:, ip=[^)]+)?|raylet|gcs_server|autoscaler[^)]*)\) ?")
_LEVELS = (
    re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[,.]\d+\s+(?P<level>[A-Z]+)\s"),  # Python's logging, Ray's
    re.compile(
        r"\[\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d,\d+ (?P<level>[DIWEFC]) \d+ \d+\]\s?(?:\([\w-]+\)\s)?"
    ),  # Ray's C++
    re.compile(r"\[(?P<level>[DIWEF])\d{4} \d\d:\d\d:\d\d\.\d+ [^\]]*\]\s?"),  # torch's C++
    re.compile(r"(?P<level>[A-Z]+) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\]\s?"),  # vLLM
)
_BELOW_ERROR = frozenset("DEBUG INFO WARNING WARN D I W".split())
_OURS = re.compile(r"(?:pplug|infra|pipelines)[.:\w]*: ")
_LAST = re.compile(r"Fatal Python error: |terminate called |Segmentation fault")
"""Words of an interpreter or a library that ends; no text of a user stands in such a line."""
_WARNING = re.compile(r"\S*:\d+: \w*Warning\b")
_BAR = re.compile(r"\[\d+:\d\d(?::\d\d)?(?:<[^,\]]*)?, *[^\]]*/(?:s|it)\b[^\]]*\]")  # [00:03<00:01, 4.3it/s]
_TRACEBACK = re.compile(r"Traceback \(most recent call last\)")
_WITHIN = re.compile(r"\s|$|Traceback \(most|The above exception|During handling of|\+-|\|")
_ERROR_LINE = re.compile(r"(?P<kind>[A-Za-z_][\w.]*)(?:\([^)]*\))?(?::|$)")
_SILENT = re.compile(r"PlacementGroupCleaner")
"""Workers of Ray whose errors change nothing: this one asks a dashboard that a local session does not have."""
_LIKE_AN_ERROR = re.compile(
    r"error|exception|fatal|critical|traceback|out of memory|\boom\b|killed|died|crash|abort|segmentation|no space",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    # Ray's answer to a full object store of a worker is to start it again, which these jobs repeat safely
    r"has constructor arguments in the object store and max_restarts > 0"
    # of a dashboard or an exporter that a local session does not have
    r"|metrics (?:exporter )?agent|event aggregator|MetricsHead|metrics_head|OpenTelemetry"
    r"|Exception ignored in|RAY_IGNORE_UNHANDLED_ERRORS"
    # the last line of the job says what was raised
    r"|An exception was raised from a task of operator"
)


class Filter:
    """Looks at one stream line by line: a line may be the rest of a warning or a traceback.

    Args:
        job: name of the job; its own lines begin with it.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._own = re.compile(rf"(?:python -m pipelines: )?{re.escape(job)}(?: done| NOT fully done)?[:,] ")
        self._within: dict[str, str] = {}

    def shown(self, line: str, run_id: str = "") -> str | None:
        """The words that a person is shown of a line; None if it is only for job.log.

        Args:
            run_id: of the job's run, where it has begun; behind the job's name it begins a line of its own.
        """
        text, source = _ANSI.sub("", line), ""
        while found := _WORKER.match(text):
            source, text = source + found[0], text[found.end() :]
        if _SILENT.search(source):
            return None
        began = self._within.pop(source, "")
        if began == "warning" and text.startswith("  "):  # the line of source code below a warning
            return None
        level, text = _level(text)
        if level in _BELOW_ERROR and not _OURS.match(text):
            return None
        if _TRACEBACK.search(text) or (began == "traceback" and _WITHIN.match(text)):
            self._within[source] = "traceback"
            return None
        own = bool(self._own.match(text)) or (run_id != "" and text.startswith(f"{self._job} {run_id}: "))
        ends = level or own or any(one.match(text) for one in (_OURS, _WARNING, _LAST))
        if began == "after" and not ends:
            self._within[source] = "after"  # more words of the error, or what stands before a traceback that follows
            return None
        if began == "traceback":
            self._within[source] = "after"
            kind = _ERROR_LINE.match(text)
            return f"{source}{kind['kind'] if kind else 'an error'} (job.log has its words and its traceback)"
        if _WARNING.match(text):
            self._within[source] = "warning"
            return None
        if _BAR.search(text) or _HARMLESS.search(text):
            return None
        if not source:
            return line
        if own:
            return text
        return f"{source}{text}" if level or _LIKE_AN_ERROR.search(text) else None


def plain(line: str) -> str:
    """The line without colours."""
    return _ANSI.sub("", line)


def has_traceback(text: str) -> bool:
    """Returns whether a traceback begins in a text."""
    return bool(_TRACEBACK.search(text))


def is_bar(text: str) -> bool:
    """Returns whether a text is a library's progress bar."""
    return bool(_BAR.search(text))


def _level(text: str) -> tuple[str, str]:
    """The level that a line was logged with ("" if none), and the text behind it."""
    for pattern in _LEVELS:
        if found := pattern.match(text):
            return found["level"], text[found.end() :]
    return "", text
