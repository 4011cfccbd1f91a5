"""The end of a failed job in words for a person: the kind of the error, the place, and what can be done about it.

The words of an error that nobody foresaw are left out: they may quote a user's text. Errors for a person to act on are
`infra.errors.InputError`, whose words are shown as they are; Ray wraps what a worker raised.
"""

import errno
import re
import traceback
from pathlib import Path

from infra.errors import InputError

_OF_A_STAGE = re.compile(
    r"^infra\.errors\.InputError: ((?:(?!\n\s*\n).)+)\s*\n"
    r"The above exception was the direct cause of the following exception:\s*\n"
    r"(?:[^\n]*\n){0,2}ray\.exceptions\.UserCodeException",
    re.MULTILINE | re.DOTALL,
)
_KIND = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit))(?::|$)", re.MULTILINE)
"""The line of a traceback that names the error."""
_OWN = tuple(str(Path(__file__).parents[1] / package) for package in ("pipelines", "infra", "pplug"))


def _causes(error: BaseException) -> list[BaseException]:
    """The error and those behind it, as Ray and Python chain them."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        cause = getattr(following, "cause", None)
        following = cause if isinstance(cause, BaseException) else following.__cause__
    return found


def kind(error: BaseException) -> str:
    """The name of the error at the bottom; its words are left out, since they may quote a user's text."""
    first, is_chained, _ = str(error).partition("\nThe above exception was the direct cause")
    named = _KIND.findall(first) if is_chained else []  # a stage of Ray Data gives back its error as text alone
    return str(named[-1] if named else type(_causes(error)[-1]).__name__).rpartition(".")[2]


def place(error: BaseException) -> str:
    """File and line of our own code that the error came through last; empty if there is none."""
    frames = [frame for one in _causes(error) for frame in traceback.extract_tb(one.__traceback__)]
    own = [frame for frame in frames if frame.filename.startswith(_OWN) and not frame.filename.endswith("__main__.py")]
    return f"{Path(own[-1].filename).relative_to(Path(__file__).parents[1])}:{own[-1].lineno}" if own else ""


def advice(error: BaseException) -> str:
    """Returns what a person can do about an error of this kind."""
    kinds = {cls.__name__ for one in _causes(error) for cls in type(one).__mro__} | {kind(error)}
    if any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in _causes(error)):
        return "the disk is full; free some space and run it again"
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return "memory ran out; lower workers or batch sizes in the config, or take a larger machine"
    if kinds & {"RayActorError", "ActorDiedError", "WorkerCrashedError", "NodeDiedError"}:
        return "a worker process died, most often because memory ran out; lower workers or batch sizes in the config"
    if "PermissionError" in kinds:
        return "a file or address may not be read or written; check the rights and the credentials"
    if kinds & {"ConnectionError", "TimeoutError", "EndpointConnectionError", "ClientError"}:
        return "storage or cluster did not answer; check the connection and run it again"
    if "ImportError" in kinds:
        return "a library is missing or does not fit; install the package again with its extras"
    return "if a rerun ends alike, this is a fault of the program; please report it with the traceback"


def input_error(error: BaseException) -> InputError | None:
    """The InputError behind an error, if there is one: Ray wraps what a worker raised, in its text and as its cause.

    An error of a stage of Ray Data comes back as text alone.
    """
    in_a_stage = _OF_A_STAGE.search(str(error))
    if in_a_stage:
        return InputError(in_a_stage[1])
    chain = _causes(error)
    for one, inner in zip(chain, [*chain[1:], None], strict=True):
        if isinstance(one, InputError) and not isinstance(inner, InputError):
            return one
    return None
