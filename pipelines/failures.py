"""The end of a failed job in words for a person: the kind of the error, the place, and what can be done about it.

Errors for a person to act on are `infra.errors.InputError`; Ray wraps those that a worker raised. The words of other
errors are shown where a `raise` of our own wrote them: a library's words may quote a user's text.
"""

import errno
import functools
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from infra.errors import InputError

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_OF_A_STAGE = re.compile(
    r"^infra\.errors\.InputError: ((?:(?!\n\s*\n).)+)\s*\n"
    r"The above exception was the direct cause of the following exception:\s*\n"
    r"(?:[^\n]*\n){0,2}ray\.exceptions\.UserCodeException",
    re.MULTILINE | re.DOTALL,
)
_RAYS_WORDS = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts \(total backoff ")
"""Beginning of what Ray Data adds to the words of a stage's error."""
_OF_AN_ACTOR = re.compile(
    r"^infra\.errors\.InputError: ((?:(?!\n\s*\n).)+?)\s*(?:\n\s*\n|\Z)", re.MULTILINE | re.DOTALL
)
"""The line of an actor's constructor that refused its input, in the text of Ray's error about the actor."""
_KIND = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit))(?::|$)", re.MULTILINE)
"""The line of a traceback that names the error."""
_RAISED = re.compile(
    r'^ *File "[^"]*?/?(?P<file>(?:infra|pplug|pipelines)/[\w/]+\.py)", line (?P<line>\d+), in .*\n *raise .*\n'
    r"(?: .*\n)*(?P<kind>[A-Za-z_][\w.]*): (?P<words>.*)",
    re.MULTILINE,
)
"""A `raise` of our own in the text of a traceback, which is all that comes back from some workers."""
_DENIED = re.compile(r"\b40[13]\b|Forbidden|AccessDenied|ExpiredToken|InvalidAccessKeyId")
"""Words of a server of objects in an OSError that the tables' library raises."""
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


def own_words(error: BaseException) -> str:
    """The words of an error that our own code has raised, with its kind and place; empty if there is no such error."""
    for one in _causes(error):
        last = traceback.extract_tb(one.__traceback__)[-1:]
        if (
            last
            and _is_own(last[0])
            and (last[0].line or "").startswith("raise")
            and type(one).__module__ == "builtins"
        ):
            return f"{' '.join(_without_rays(str(one)).split())} ({type(one).__name__} at {_short(last[0])})"
        if found := [*_RAISED.finditer(str(one))][-1:]:
            raised = found[0]
            return f"{raised['words']} ({raised['kind']} at {raised['file']}:{raised['line']})"
    return ""


def kind(error: BaseException) -> str:
    """The name of the error at the bottom; its words are left out, since they may quote a user's text."""
    first, is_chained, _ = str(error).partition("\nThe above exception was the direct cause")
    named = _KIND.findall(first) if is_chained else []  # a stage of Ray Data gives back its error as text alone
    return str(named[-1] if named else type(_causes(error)[-1]).__name__).rpartition(".")[2]


def place(error: BaseException) -> str:
    """File and line of our own code that the error came through last; empty if there is none."""
    frames = [frame for one in _causes(error) for frame in traceback.extract_tb(one.__traceback__)]
    own = [frame for frame in frames if _is_own(frame)]
    return _short(own[-1]) if own else ""


def _is_own(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith(_OWN) and not frame.filename.endswith("__main__.py")


def _short(frame: traceback.FrameSummary) -> str:
    return f"{Path(frame.filename).relative_to(Path(__file__).parents[1])}:{frame.lineno}"


def advice(error: BaseException) -> str:
    """Returns what a person can do about an error of this kind."""
    kinds = {cls.__name__ for one in _causes(error) for cls in type(one).__mro__} | {kind(error)}
    if any(isinstance(one, OSError) and one.errno == errno.ENOSPC for one in _causes(error)):
        return "the disk is full; free some space and run it again"
    if any(isinstance(one, OSError) and _DENIED.search(str(one)) for one in _causes(error)):
        return "the storage denied access: credentials have expired or lack a right; renew them and run it again"
    if kinds & {"MemoryError", "OutOfMemoryError"}:
        return "memory ran out; lower workers or batch sizes in the config, or take a larger machine"
    if kinds & {"RayActorError", "ActorDiedError", "WorkerCrashedError", "NodeDiedError"}:
        return "a worker process died, most often because memory ran out; lower workers or batch sizes in the config"
    if "FileNotFoundError" in kinds:
        return "a file is missing; the log names it"
    if "PermissionError" in kinds:
        return "a file or address may not be read or written; check the rights and the credentials"
    if "ExecutionTimeoutError" in kinds:  # of Ray Data
        return (
            "no rows have come for a day: workers hang, die again and again, or wait for nodes that the cluster does "
            "not get (`ray status` says it); look there and in the workers' logs, lower batch sizes if one batch takes "
            "that long, and run it again, which goes on from what is committed"
        )
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
        return InputError(_without_rays(in_a_stage[1]))
    chain = _causes(error)
    in_an_actor = next((str(one) for one in chain if "in its creation task" in str(one)), None)
    if in_an_actor and (refused := [*_OF_AN_ACTOR.finditer(in_an_actor)]):
        return InputError(_without_rays(refused[-1][1]))
    for one, inner in zip(chain, [*chain[1:], None], strict=True):
        own = type(one).__module__ == InputError.__module__  # Ray makes classes that are both: a task's error and this
        if isinstance(one, InputError) and (own or not isinstance(inner, InputError)):
            words = _without_rays(str(one))
            return one if words == str(one) else InputError(words)
    return None


def _without_rays(words: str) -> str:
    return _RAYS_WORDS.split(words)[0]


def plain_refusals(run: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorator of a job's `run`: what a worker refused leaves it as the InputError that Ray has wrapped."""

    @functools.wraps(run)
    def plainly(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        try:
            return run(*args, **kwargs)
        except Exception as error:
            refused = input_error(error)
            if refused is None or refused is error:
                raise
            raise refused from error

    return plainly
