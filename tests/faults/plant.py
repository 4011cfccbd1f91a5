"""Puts faults back that were mended once, one by one, in a scratch copy: each has to be caught by the test named.

    python -m tests.faults.plant [NAME ...]

A fault is an edit of one line; a line that is no longer there ends the run, so that this list follows the code.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    file: str
    line: str
    instead: str
    test: str


ALIKE = "tests/pipelines/test_requests_of_one_name.py"
FAULTS = {
    "retrieval-by-request-id": Fault(
        "pipelines/generate/parts/retrieval.py",
        '(found, request["user_id"], request["request_id"]) for request',
        '(found, "", request["request_id"]) for request',
        f"{ALIKE}::test_no_item_of_one_user_stands_in_anothers_prompt",
    ),
    "answered-by-request-id": Fault(
        "pipelines/generate/pending.py",
        'return row["user_id"], row["request_id"]',
        'return "", row["request_id"]',
        f"{ALIKE}::test_a_rerun_answers_every_users_request_of_one_name",
    ),
    "seed-by-request-id": Fault(
        "pipelines/generate/replies.py",
        "EnginePrompt(json.dumps(key)",
        "EnginePrompt(json.dumps(key[1:])",
        f"{ALIKE}::test_sampled_replies_of_one_name_draw_by_their_own_users",
    ),
    "error-is-an-answer": Fault(
        "pipelines/generate/pending.py",
        'if row["error"] is not None:',
        'if row["error"] is not None and False:',
        f"{ALIKE}::test_a_reply_with_an_error_is_asked_for_again",
    ),
    "one-run-id-two-models": Fault(
        "pipelines/generate/checks.py",
        "    if differ:",
        "    if differ and not differ:",
        f"{ALIKE}::test_one_run_id_stands_for_one_way_of_answering",
    ),
    "profile-knows-the-answer": Fault(
        "pipelines/learned.py",
        "return history.is_visible(self.occurred_at, self.position, as_of, as_of_position)",
        "return True",
        f"{ALIKE}::test_profiles_that_know_an_answer_are_refused_and_those_that_know_too_much_not_used",
    ),
    "adapter-knows-the-answer": Fault(
        "pipelines/engines/adapters.py",
        "return made_from is not None and not made_from.is_visible_to(request)",
        "return False",
        "tests/pipelines/test_adapters.py::"
        "test_an_adapter_is_chosen_only_for_requests_that_may_see_what_it_was_made_from",
    ),
    "times-through-a-float": Fault(
        "pipelines/histories.py",
        "(value - _EPOCH) // timedelta(microseconds=1)",
        "int(value.timestamp() * 1_000_000)",
        "tests/pipelines/test_stored_personas.py::test_times_are_exact_to_the_microsecond",
    ),
    "persona-of-an-older-history": Fault(
        "pipelines/generate/parts/plug.py",
        "self._is_of[key] = digest == self._made_from[user_id]",
        "self._is_of[key] = bool(digest)",
        "tests/pipelines/test_stored_personas.py::test_another_number_of_newest_items_is_another_persona",
    ),
    "byte-order-mark-in-an-id": Fault(
        "infra/lines.py",
        '_AROUND = string.whitespace + "\\ufeff\\u00a0"',
        "_AROUND = string.whitespace[:0]",
        "tests/pipelines/test_given_files.py::test_a_file_of_ids_is_read_alike_however_it_was_saved",
    ),
    "shown-in-spite-of-rejects": Fault(
        "pipelines/waves.py",
        "complete = complete and not (self.replace and self.report.too_many_rejects)",
        "complete = bool(complete)",
        "tests/pipelines/test_gate.py::test_replaced_buckets_are_shown_only_within_the_limit_of_rejects",
    ),
    "complete-without-all-rows": Fault(
        "pipelines/waves.py",
        "paid = all(self._got[bucket] == rows for bucket, rows in self.pending.items())",
        "paid = all(self._got[bucket] for bucket in self.pending)",
        "tests/pipelines/test_gate.py::test_a_bucket_that_lacks_a_row_is_never_complete",
    ),
    "cut-past-an-unanswered-request": Fault(
        "pipelines/asked.py",
        "part.group == self.group and part.instead is None",
        "part.group == self.group",
        "tests/pipelines/test_growing_requests.py::"
        "test_adapters_follow_the_requests_to_be_answered_and_know_nothing_of_their_future",
    ),
    "run-id-with-other-input": Fault(
        "infra/runs.py",
        "    if others:",
        "    if others and not others:",
        "tests/infra/test_runs.py",
    ),
    "restore-past-an-erase": Fault(
        "infra/upkeep.py",
        " or log.ERASING in info",
        "",
        "tests/pipelines/test_restore.py::test_an_erase_that_broke_off_bars_the_way_too",
    ),
    "base-learns-the-answers": Fault(
        "pipelines/cut.py",
        "visible[np.array(rows)[order[count:]]] = False",
        "visible[np.array(rows)[order[count:]]] = True",
        "tests/pipelines/test_base_cut.py::test_a_base_learns_no_item_that_a_request_may_not_see",
    ),
    "another-runs-samples": Fault(
        "pipelines/written.py",
        "    if read != written:",
        "    if read is None:",
        "tests/pipelines/test_own_files.py::test_examples_are_read_by_their_names_and_counts",
    ),
    "help-is-claimed-by-chance": Fault(
        "pplug/intervals.py",
        "np.percentile(ends.max(axis=1), 97.5)",
        "np.percentile(ends[:, 0], 97.5)",
        "tests/pipelines/test_verdict.py::"
        "test_where_no_method_does_anything_help_is_claimed_in_2_5_percent_of_evaluations_at_most",
    ),
    "the-user-is-claimed-anyhow": Fault(
        "pipelines/evaluate/verdict.py",
        "return USER if beaten_others and not unbeaten else UNKNOWN",
        "return USER",
        "tests/pipelines/test_verdict.py::test_the_words_follow_the_controls",
    ),
    "nobody-says-that-nothing-was-understood": Fault(
        "pplug/metrics.py",
        "understood=lambda entry, prediction: _number(prediction) is not None",
        "understood=lambda entry, prediction: True",
        "tests/pplug/test_metrics.py::test_a_reply_that_is_no_answer_is_told_from_a_wrong_one",
    ),
    "control-token-from-a-text": Fault(
        "pplug/plain_text.py",
        "list(row) if self.control.keys().isdisjoint(row) else self._in_pieces(text)",
        "list(row)",
        "tests/pplug/test_plain_text.py::test_no_text_yields_a_control_token_in_a_prompt_or_a_target",
    ),
    "stack-that-mixes-users": Fault(
        "pplug/stackable.py",
        "    if not moved <= (1e-3 if exact else 1e-2):",
        "    if moved < 0:",
        "tests/pplug/test_stackable.py::test_a_family_whose_layers_run_along_the_row_is_refused",
    ),
    "set-aside-for-ever": Fault(
        "pipelines/refresh/increment.py",
        'RETRIED = frozenset({"not_finite"})',
        "RETRIED = frozenset[str]()",
        "tests/pipelines/test_set_aside.py::"
        "test_a_text_without_a_finite_vector_is_tried_again_and_nobody_else_is_looked_at",
    ),
}


def main(names: list[str]) -> int:
    """Returns 1 where a fault was not caught."""
    missed = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "project"
        keep_out = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=keep_out)
        for name in names or FAULTS:
            fault = FAULTS[name]
            path = copy / fault.file
            sound = path.read_text(encoding="utf-8")
            if sound.count(fault.line) != 1:
                print(f"{name}: {fault.file} holds the line {sound.count(fault.line)} times: {fault.line}")
                return 2
            path.write_text(sound.replace(fault.line, fault.instead), encoding="utf-8")
            words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", fault.test]
            environment = os.environ | {"PYTHONPATH": str(copy)}
            done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
            path.write_text(sound, encoding="utf-8")
            # 1: a test failed; anything else is no test that ran to its end
            print(f"{'caught' if done.returncode == 1 else 'MISSED'}  {name}  by {fault.test}", flush=True)
            missed += done.returncode != 1
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
