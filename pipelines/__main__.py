"""The command line: `python -m pipelines <job> [--config FILE] [--set key=value ...] [--key value ...] [--debug]`.

Each job has a config (pydantic), whose docstring is its help, and a module with `run(config) -> exit code`. Only the
config is imported for `--help` and for a wrong command line: nothing heavy is loaded before the job runs.
A job that an error ends says in one line what failed and what to do; the traceback goes to job.log in its run folder,
and with `--debug` (or PPLUG_DEBUG=1) everything is shown: tracebacks, and what Ray, vLLM and workers say.
With `--log-json` (or PPLUG_LOG_JSON=1) each line is a JSON object, for a collector of logs.
Exit codes: 0 done; 1 failed or partly done; 2 wrong usage or config; 3 more rejects than allowed; 130 interrupted;
143 ended by SIGTERM.
"""

import difflib
import importlib
import inspect
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel

from infra import addresses, stopping, submission
from infra.errors import ConcurrentRunError, InputError
from pipelines import failures

if TYPE_CHECKING:
    from infra.job_log import JobLog


class Job(NamedTuple):
    module: str
    """Has `run(config)`; imported when the job runs."""
    keys: str
    """Module and class of its config; imported for `--help`."""
    about: str
    again: str = "goes on where this run stopped"
    """Said of a run's name when an error has ended it."""

    @property
    def config(self) -> type[BaseModel]:
        module, _, name = self.keys.partition(":")
        found: type[BaseModel] = getattr(importlib.import_module(module), name)
        return found


DEBUG, LOG_JSON = "--debug", "--log-json"
JOBS = {
    "quickstart": Job(
        "pipelines.lines.quickstart",
        "pipelines.lines.config:QuickstartConfig",
        "a file of your own -> a report with a plug, by one command",
    ),
    "ingest": Job(
        "pipelines.ingest.job",
        "pipelines.ingest.config:IngestConfig",
        "files of any common format, or a LaMP folder -> histories, requests",
    ),
    "refresh": Job(
        "pipelines.refresh.job", "pipelines.refresh.config:Config", "histories (and a plug) -> embeddings, personas"
    ),
    "train": Job(
        "pipelines.train.job", "pipelines.train.config:Config", "histories, embeddings, requests with targets -> a plug"
    ),
    "adapt": Job(
        "pipelines.adapt.job",
        "pipelines.adapt.config:Config",
        "histories -> one adapter per user, many at once; or the base they stand on",
    ),
    "generate": Job(
        "pipelines.generate.job",
        "pipelines.generate.config:Config",
        "requests and personas or embeddings -> generations, for one or several methods",
    ),
    "judge": Job(
        "pipelines.generate.judge",
        "pipelines.generate.judge_config:JudgeConfig",
        "replies to requests with a rubric -> their scores, by an LLM that is asked aspect by aspect",
    ),
    "evaluate": Job(
        "pipelines.evaluate.job",
        "pipelines.evaluate.config:EvaluateConfig",
        "generations and targets -> report.html, report.json; or two runs compared",
    ),
    "show": Job(
        "pipelines.upkeep.show",
        "pipelines.upkeep.config:ShowConfig",
        "rows of a table as text on the screen: replies, rejects, histories, ...",
    ),
    "export": Job(
        "pipelines.upkeep.export",
        "pipelines.upkeep.config:ExportConfig",
        "a table -> plain Parquet, or one user's adapter -> a PEFT folder",
    ),
    "publish": Job(
        "pipelines.upkeep.publish",
        "pipelines.upkeep.config:PublishConfig",
        "a folder with a plug, an LLM or an encoder -> s3://, where all nodes fetch it from",
    ),
    "import-adapter": Job(
        "pipelines.upkeep.import_adapter",
        "pipelines.upkeep.config:ImportAdapterConfig",
        "a PEFT folder with a LoRA -> one user's adapter",
    ),
    "compact": Job(
        "pipelines.upkeep.compact",
        "pipelines.upkeep.config:CompactConfig",
        "the tables' small files of many nights -> few, sorted by user",
    ),
    "vacuum": Job(
        "pipelines.upkeep.vacuum",
        "pipelines.upkeep.config:VacuumConfig",
        "deletes files that no version within the retention names",
    ),
    "drop-run": Job(
        "pipelines.upkeep.drop_run",
        "pipelines.upkeep.config:DropRunConfig",
        "takes the replies of runs out of the tables, by name or by age",
    ),
    "drop-requests": Job(
        "pipelines.upkeep.drop_requests",
        "pipelines.upkeep.config:DropRequestsConfig",
        "takes requests and the replies to them out of the tables, by age or by who has answered them",
    ),
    "restore": Job(
        "pipelines.upkeep.restore",
        "pipelines.upkeep.config:RestoreConfig",
        "takes tables back to an earlier complete version, as a new version",
    ),
    "rebucket": Job(
        "pipelines.upkeep.rebucket",
        "pipelines.upkeep.config:RebucketConfig",
        "more buckets for all tables of a population that grew",
    ),
    "migrate": Job(
        "pipelines.upkeep.migrate",
        "pipelines.upkeep.config:MigrateConfig",
        "tables of an earlier release -> the schema versions that this release reads",
    ),
    "erase": Job(
        "pipelines.upkeep.erase",
        "pipelines.upkeep.config:EraseConfig",
        "users gone from every table, version, run and export, proved by opening all files",
    ),
    "plan": Job(
        "pipelines.plan.job",
        "pipelines.plan.config:PlanConfig",
        "numbers of users, items, requests -> hours, GPUs, bytes and money of each job",
    ),
    "lamp": Job(
        "pipelines.lines.lamp",
        "pipelines.lines.config:LampConfig",
        "a task of the LaMP benchmark from download to report, with the paper's settings",
    ),
    "base-lm": Job(
        "pipelines.lines.base_lm",
        "pipelines.lines.config:BaseLMConfig",
        "a histories table -> a tiny language model, to try the line without a model hub",
        "begins anew: it keeps no checkpoint",
    ),
    "demo": Job(
        "pipelines.lines.demo",
        "pipelines.lines.config:DemoConfig",
        "the whole line on an embedded world: no download, no GPU, minutes",
    ),
}


def main(words: list[str] | None = None) -> int:
    """Runs one job and returns its exit code.

    Args:
        words: the command line; None: that of this process, whose Ray session then ends with the job.
    """
    is_process = words is None
    words = sys.argv[1:] if words is None else words
    debug = DEBUG in words or os.environ.get("PPLUG_DEBUG") == "1"
    as_json = LOG_JSON in words or os.environ.get("PPLUG_LOG_JSON") == "1"
    words = [word for word in words if word not in (DEBUG, LOG_JSON)]
    if words[:1] in (["--help"], ["-h"], ["help"]):
        print(_overview())
        return 0
    if words[:1] == ["--version"]:
        import importlib.metadata

        print(importlib.metadata.version("pplug"))
        return 0
    if not words:
        print(_overview(), file=sys.stderr)
        return 2
    name, *rest = words
    if name not in JOBS:
        close = difflib.get_close_matches(name.replace("_", "-"), JOBS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        with _output("pplug", as_json):
            return _wrong(f"there is no job {name!r}.{hint} Jobs: {', '.join(JOBS)}")
    return _run(name, rest, debug, as_json, is_process)


def _run(name: str, words: list[str], debug: bool, as_json: bool, is_process: bool) -> int:
    from pipelines import options

    keys = JOBS[name].config
    if {"--help", "-h"} & set(words):
        print(_help(name, keys))
        return 0
    with _output(name, as_json):
        try:
            config = options.check(keys, options.read(words, keys))
        except InputError as error:
            message = str(error)
            lines = f"the config is wrong:\n{message}" if message.startswith("  ") else message
            code = _wrong(f"{name}: {lines}\n(`{_program()} {name} --help` lists the keys)", words)
            return _unreported(name, code, is_process)
    from infra.job_log import JobLog

    with JobLog(name, debug, as_json) as log:
        try:
            return _logged(name, config, log)
        finally:
            _let_go(is_process)  # at the end workers' last lines come, which the log has to take


def _output(job: str, as_json: bool) -> AbstractContextManager[object]:
    """Output from before a job begins: as it is, or each line as a JSON object."""
    if not as_json:
        return nullcontext()  # so that a wrong command line is answered at once
    from infra.job_log import JobLog

    return JobLog(job, as_json=True)


def _logged(name: str, config: BaseModel, log: "JobLog") -> int:
    """Runs the job and returns its exit code; an error that ends it is explained, and leaves a report."""
    from infra.report import RunReport

    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    (handler := _ToStderr()).setFormatter(form)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for ours in ("pplug", "infra", "pipelines"):
        logging.getLogger(ours).setLevel(logging.INFO)
    RunReport.unfinished = None
    try:
        stopping.install()
        _refuse_places(name, config)
        return int(importlib.import_module(JOBS[name].module).run(config))
    except (Exception, KeyboardInterrupt) as error:
        log.error(error)
        unfinished = RunReport.unfinished
        code = _explained(name, error, config, log, unfinished.run_id if unfinished is not None else None)
        if unfinished is None:
            return _unreported(name, code, False)
        try:  # the job had begun to count: how far it came is worth keeping
            unfinished.abandon(error, code)
        except Exception as unwritten:  # botocore's errors, such as that nothing answers, are no OSErrors
            log.error(unwritten)
            why = f"{failures.kind(unwritten)}: {failures.advice(unwritten)}"
            print(f"{name}: no report could be written ({why})", file=sys.stderr)
        return code


def _unreported(name: str, code: int, is_process: bool) -> int:
    """Tells a cluster's metrics of a job that has ended before its report began; returns its exit code."""
    from infra import metrics, session

    session.join_to_report()
    metrics.JOB_END.record(time.time(), job=name, exit_code=str(code))
    _let_go(is_process)
    return code


def _let_go(is_process: bool) -> None:
    """Leaves Ray, where it is this process that has joined it."""
    if is_process and "ray" in sys.modules:
        from infra import metrics, session

        metrics.let_go()
        session.stop()


class _ToStderr(logging.Handler):
    """Writes to stderr as it is at the time, which is another stream for each job of a line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _explained(name: str, error: BaseException, config: BaseModel, log: "JobLog", run_id: str | None) -> int:
    """Says in one line what ended a job and what to do. Returns the exit code."""
    again = f"; run_id={run_id} {JOBS[name].again}" if run_id else ""
    if isinstance(error, KeyboardInterrupt):
        ended = isinstance(error, stopping.Terminated)
        print(f"{name}: {'ended by SIGTERM' if ended else 'interrupted'}{again}", file=sys.stderr)
        return stopping.CODE if ended else 130
    if isinstance(error, ConcurrentRunError):
        print(f"{_program()}: {name}: {error}", file=sys.stderr)
        return 1
    wrong_input = failures.input_error(error)
    if wrong_input is not None:
        return _wrong(f"{name}: {wrong_input}", config)
    log.keep = True
    where = f" at {place}" if (place := failures.place(error)) else ""
    shown = "The traceback stands above and" if log.debug else f"{DEBUG} shows the traceback, which stands"
    what = failures.own_words(error) or f"{failures.kind(error)}{where}: {failures.advice(error)}"
    print(f"{name}: failed: {what}{again}. {shown} in {log.place}", file=sys.stderr)
    return 1


def _wrong(message: str, given: Any = ()) -> int:
    """Prints what is wrong. `given`: words or config of the job; a file that a submission left behind is named."""
    print(f"{_program()}: {message}", file=sys.stderr)
    if left := submission.left_behind(word.rpartition("=")[2] for word in _texts(given)):
        print(f"{_program()}: {left}", file=sys.stderr)
    return 2


def _texts(value: Any) -> Iterator[str]:
    """All texts that were given in a config, or in a list of words."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for one in value.values() for text in _texts(one))
    elif isinstance(value, Iterable):
        yield from (text for one in value for text in _texts(one))


def _refuse_places(name: str, config: BaseModel) -> None:
    """Refuses results that a submitted job would lose, and places that cannot be used, before anything starts.

    Raises:
        InputError: names the key, or the address.
    """
    written = ["tables", "run_dir", "output", *(["plug"] if name == "train" else [])]
    given = {key: getattr(config, key) for key in written if hasattr(config, key)}
    looks_only = getattr(config, "check", None) is not None
    submission.refuse_lost({k: v for k, v in given.items() if v is not None or (k == "run_dir" and not looks_only)})
    if given.get("tables"):
        addresses.refuse_misread(given["tables"])
    on_s3 = [text for text in _texts(config) if text.startswith("s3://")]
    if on_s3:
        from infra import s3

        s3.check(on_s3)


def _program() -> str:
    return "python -m pipelines" if sys.argv[0].endswith("__main__.py") else "pplug"


def _overview() -> str:
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {name:<{width}}  {job.about}" for name, job in JOBS.items())
    return (
        f"usage: {_program()} <job> [--config FILE] [--set key=value ...] [--key value ...] [--debug]\n\n"
        f"Personalises a large language model for many users, in batches.\n\njobs:\n{jobs}\n\n"
        f"`{_program()} <job> --help` lists a job's keys. The same jobs run on a cluster by `ray job submit`.\n"
        f"{DEBUG} (or PPLUG_DEBUG=1) shows tracebacks and all that libraries say; without it they stand in job.log of "
        "the run folder alone.\n"
        f"{LOG_JSON} (or PPLUG_LOG_JSON=1) makes each line of the output and of job.log a JSON object."
    )


def _help(name: str, keys: type[BaseModel]) -> str:
    from pipelines import options

    return (
        f"usage: {_program()} {name} [--config FILE] [--set key=value ...] [--key value ...] [--debug]\n\n"
        f"{inspect.cleandoc(keys.__doc__ or JOBS[name].about)}\n\n"
        "keys (a flag here, `key=value` after --set, or a line of the YAML file; a dot reaches into a group):\n"
        f"{options.describe(keys)}"
    )


if __name__ == "__main__":
    sys.exit(main())
