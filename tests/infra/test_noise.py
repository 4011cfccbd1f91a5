"""Which lines a person is shown: seen in real runs of Ray 2.60 and vLLM 0.32."""

import pytest

from infra.noise import Filter

CYAN, END = "\x1b[36m", "\x1b[0m"


def shown(*lines: str, job: str = "refresh") -> list[str]:
    looks = Filter(job)
    return [text for line in lines if (text := looks.shown(line)) is not None]


@pytest.mark.parametrize(
    "line",
    [
        "2026-11-26 00:02:48,193\tWARNING authentication_token_setup.py:85 -- Token authentication is enabled.",
        "[2026-11-26 00:04:10,821 E 26409 26409] core_worker.cc:2465: Actor with class name: 'MapWorker' has "
        "constructor arguments in the object store and max_restarts > 0. If the ...",
        "[2026-11-26 00:04:10,821 W 26409 26409] (raylet) memory.cc:1: error rate is high",
        "WARNING 11-26 00:05:00 [cpu.py:12] Environment variable VLLM_CPU_KVCACHE_SPACE is not set",
        f"{CYAN}(MapWorker(MapBatches(Reply)) pid=7){END} Triton is installed, but doesn't include CPU backend.",
        f"{CYAN}(MapWorker(MapBatches(Reply)) pid=7){END} (Engine pid=9) INFO 11-26 00:05:00 [core.py:7] error: no",
        f"{CYAN}(TrainController pid=28256){END} Requesting resources: {{'CPU': 1}} * 1",
        f"{CYAN}(TrainController pid=28256){END} [2026-11-26 00:05:12,635 E 1 2] core_worker.cc:2465: Actor has "
        "constructor arguments in the object store and max_restarts > 0.",
        f"{CYAN}(PlacementGroupCleaner pid=28304){END} ConnectionError: Found multiple active Ray instances: {{...}}",
        f"{CYAN}(RayTrainWorker pid=2, ip=10.0.0.7){END} Setting up process group for: env:// [rank=0, world_size=1]",
        "Writing model shards: 100%|██████████| 1/1 [00:00<00:00, 163.61it/s]",
        f"{CYAN}(MapWorker(MapBatches(Reply)) pid=7){END} [W1126 00:09:42.316357954 utils.cpp:68] Warning: NUMA error",
        "Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]",
        "5it [00:10, 2.1s/it]",
        "pipelines/x.py:266: RayDeprecationWarning: `ray_remote_args` is deprecated and will be removed",
    ],
)
def test_what_nobody_can_do_anything_about_is_for_the_log_alone(line):
    assert shown(line) == []


@pytest.mark.parametrize(
    "line",
    [
        "refresh done: 468 written",
        "refresh, embed: 92 of 398 texts (23%), 5.5 texts/s, 56 s left",
        "2026-11-26 00:02:48,193\tERROR worker.py:85 -- the node went away",
        "2026-11-26 00:02:48,193 INFO pipelines.engines.vllm: engine: GPU, dtype bfloat16",
        "[2026-11-26 00:04:10,821 E 26409 26409] core_worker.cc:1: the raylet is gone",
        "",
        "any line of the job itself",
    ],
)
def test_the_jobs_own_lines_and_errors_are_shown_as_they_are(line):
    assert shown(line) == [line]


def test_of_workers_the_jobs_lines_and_what_looks_like_an_error_are_shown():
    assert shown(f"{CYAN}(RayTrainWorker pid=7){END} train: goes on at step 5", job="train") == [
        "train: goes on at step 5"
    ]
    assert shown(f"{CYAN}(MapWorker(A)->MapBatches(B) pid=7){END} the engine died; this actor ends") == [
        "(MapWorker(A)->MapBatches(B) pid=7) the engine died; this actor ends"
    ]
    assert shown("(raylet) Task was killed due to the node running low on memory.") != []
    assert shown("(pid=7) ERROR 11-26 00:05:00 [core.py:7] engine core gave up") == ["(pid=7) engine core gave up"]


def test_a_traceback_shows_the_kind_of_its_error_and_none_of_its_words():
    got = shown(
        "(f pid=1) Exception in thread loop:",
        "(f pid=1) Traceback (most recent call last):",
        '(f pid=1)   File "x.py", line 1, in f',
        "(g pid=2) Traceback (most recent call last):",
        "(f pid=1)     raise ValueError(text)",
        "(g pid=2)   frame of another worker, between the lines of the first",
        "(f pid=1) ValueError: words of a user",
        "(g pid=2) torch.OutOfMemoryError",
        "(f pid=1) ",
        "(f pid=1) The above exception was the direct cause of the following exception:",
        "(f pid=1) said later",
    )
    assert got == [
        "(f pid=1) Exception in thread loop:",
        "(f pid=1) ValueError (job.log has its words and its traceback)",
        "(g pid=2) torch.OutOfMemoryError (job.log has its words and its traceback)",
    ]


def test_words_of_an_error_that_take_several_lines_are_hidden_to_their_end():
    assert shown(
        "Traceback (most recent call last):",
        '  File "x.py", line 1, in f',
        "ValueError: bad row",
        "my private text of a user",
        "",
        "an error that the user has written",
        "train to London",
        "train, embed: 92 of 398 texts",
        "any line of the job itself",
        job="train",
    ) == [
        "ValueError (job.log has its words and its traceback)",
        "train, embed: 92 of 398 texts",
        "any line of the job itself",
    ]
    assert shown(
        "(f pid=1) Traceback (most recent call last):",
        "(f pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for Row",
        "(g pid=2) the engine died; this actor ends",
        "(f pid=1) dish",
        "(f pid=1)   Input should be a valid integer [type=int_parsing, input_value='private', input_type=str]",
        "(f pid=1)     For further information visit https://errors.pydantic.dev/2/v/int_parsing",
        "(f pid=1) ERROR 11-26 00:05:00 [core.py:7] engine core gave up",
        "(f pid=1) killed",
    ) == [
        "(f pid=1) pydantic_core._pydantic_core.ValidationError (job.log has its words and its traceback)",
        "(g pid=2) the engine died; this actor ends",
        "(f pid=1) engine core gave up",
        "(f pid=1) killed",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "refresh: failed: disk full",
        "refresh done: 468 written",
        "refresh NOT fully done: 468 written",
        "python -m pipelines: refresh: no table histories",
        "pplug: refresh: no table histories",
        "2026-11-26 00:02:48,193\tERROR worker.py:85 -- the node went away",
    ],
)
def test_the_jobs_own_line_ends_the_words_of_an_error(line):
    assert shown("Traceback (most recent call last):", "ValueError: bad", "more", line, "and this")[1:] == [
        line,
        "and this",
    ]


def test_the_words_of_an_error_are_not_taken_for_the_jobs_own_lines():
    looks = Filter("train")
    lines = [
        "Traceback (most recent call last):",
        "ValueError: bad row",
        "train tickets: private",
        "train said, private",
    ]
    assert [looks.shown(line, "night-1") for line in lines][2:] == [None, None]
    assert looks.shown("train night-1: 3 units are missing", "night-1") == "train night-1: 3 units are missing"


def test_an_error_that_a_worker_passes_over_hides_nothing_that_it_says_of_its_end():
    source = "(MapWorker(A) pid=7) "
    lines = ["Exception ignored in: <f>", "Traceback (most recent call last):", "  File x", "AttributeError: a",
             "anything", "pipelines.engines.vllm: the engine died; this actor ends",
             "Fatal Python error: Aborted"]  # fmt: skip
    assert shown(*(source + line for line in lines)) == [
        f"{source}AttributeError (job.log has its words and its traceback)",
        f"{source}pipelines.engines.vllm: the engine died; this actor ends",
        f"{source}Fatal Python error: Aborted",
    ]


def test_the_source_line_below_a_warning_goes_with_it_and_the_next_line_stays():
    assert shown("a/b.py:9: FutureWarning: old", "  old(1)", "  indented by the job") == ["  indented by the job"]
