"""A folder that is written takes its place as a whole: no file of a former one stays, and no reader sees a mixture."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from pplug.folder import check_replaceable, whole_folder
from pplug.plug import PersonaPlug, PlugConfig, plug_id
from tests.pplug.models import tiny_bert

KNOWN = ("a", "b", "part-*")


def attention_plug(folder):
    encoder = AutoModel.from_pretrained(tiny_bert(folder / "encoder"))
    return PersonaPlug(PlugConfig(encoder_dim=16, llm_dim=8), encoder)


def mean_plug(temperature=1.0):
    """A plug whose every weight is its temperature, so that weights and config of two plugs can be told apart."""
    plug = PersonaPlug(PlugConfig(encoder_dim=64, llm_dim=256, aggregation="mean", temperature=temperature))
    with torch.no_grad():
        for parameter in plug.parameters():
            parameter.fill_(temperature)
    return plug


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_a_mean_plug_saved_over_an_attention_plug_loads(tmp_path):
    attention_plug(tmp_path).save_pretrained(tmp_path / "plug")
    assert "query_encoder/config.json" in names(tmp_path / "plug")
    mean_plug().save_pretrained(tmp_path / "plug")
    loaded = PersonaPlug.from_pretrained(tmp_path / "plug")
    assert loaded.emb_model is None and loaded.config.aggregation == "mean"
    assert names(tmp_path / "plug") == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["encoder", "plug"]


def _save_by_turns(folder, until):
    plugs = [mean_plug(1.0), mean_plug(2.0)]
    while not until.is_set():
        for plug in plugs:
            plug.save_pretrained(folder)
            time.sleep(0.05)  # a reader on a busy machine needs some time between two


def test_a_reader_beside_a_writer_gets_one_whole_plug(tmp_path):
    """Another process replaces the plug all the time; each load has the weights that belong to its config."""
    folder = tmp_path / "plug"
    mean_plug().save_pretrained(folder)
    ids = set()
    for temperature in (1.0, 2.0):
        mean_plug(temperature).save_pretrained(tmp_path / "alone")
        ids.add(plug_id(tmp_path / "alone"))
    context = multiprocessing.get_context("spawn")
    until = context.Event()
    writer = context.Process(target=_save_by_turns, args=(folder, until))
    start = (folder / "model.safetensors").stat().st_ino
    writer.start()
    try:
        while (folder / "model.safetensors").stat().st_ino == start:
            assert writer.is_alive()
        seen, loads = set(), 0
        while loads < 40 or len(seen) < 2:
            plug = PersonaPlug.from_pretrained(folder)
            values = {value for tensor in plug.state_dict().values() for value in tensor.unique().tolist()}
            assert values == {plug.config.temperature}
            loads += 1
            seen |= values
            assert plug_id(folder) in ids
    finally:
        until.set()
        writer.join(30)


def test_nothing_of_the_former_folder_stays(tmp_path):
    target = tmp_path / "out"
    for name, text in (("a", "1"), ("b", "2")):
        with whole_folder(target, KNOWN) as draft:
            (draft / name).write_text(text)
            assert not target.exists() or name == "b" and names(target) == ["a"]
    assert names(target) == ["b"] and os.listdir(tmp_path) == ["out"]


def test_an_error_leaves_the_former_folder_and_no_draft(tmp_path):
    with whole_folder(tmp_path / "out", KNOWN) as draft:
        (draft / "a").write_text("1")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", KNOWN) as draft:
        (draft / "b").write_text("2")
        raise RuntimeError
    assert names(tmp_path) == ["out/a"] and os.listdir(tmp_path) == ["out"]


def test_a_killed_writer_leaves_the_former_folder_and_a_draft_that_the_next_one_removes(tmp_path):
    with whole_folder(tmp_path / "out", KNOWN) as draft:
        (draft / "a").write_text("1")
    code = (
        "import os, sys, pathlib; from pplug.folder import whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1]), ('a', 'b')) as draft:\n"
        "    (draft / 'b').write_text('2'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], timeout=60)
    assert done.returncode == -9 and names(tmp_path / "out") == ["a"] and len(os.listdir(tmp_path)) == 2
    with whole_folder(tmp_path / "out", KNOWN) as draft:
        (draft / "b").write_text("3")
        with whole_folder(tmp_path / "out", KNOWN) as other:  # a living writer's draft is let be
            (other / "a").write_text("4")
    assert names(tmp_path) == ["out/b"] and os.listdir(tmp_path) == ["out"]


def test_a_folder_with_a_file_that_no_writer_made_is_refused_and_left(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "a").write_text("1")
    for refused in (lambda: check_replaceable(tmp_path, KNOWN), lambda: whole_folder(tmp_path, KNOWN).__enter__()):
        with pytest.raises(ValueError, match=r"notes\.txt.*would be lost.*another folder"):
            refused()
    (tmp_path / "file").write_text("1")
    with pytest.raises(ValueError, match="is no folder"):
        check_replaceable(tmp_path / "file", KNOWN)
    assert names(tmp_path) == ["a", "file", "notes.txt"]


def test_a_link_stays_a_link_to_the_folder_that_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with whole_folder(tmp_path / "link", KNOWN) as draft:
        (draft / "a").write_text("1")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["a"]


def test_two_renames_do_where_the_file_system_cannot_exchange(tmp_path, monkeypatch):
    import pplug.folder

    monkeypatch.setattr(pplug.folder, "_exchange", lambda one, other: False)
    test_nothing_of_the_former_folder_stays(tmp_path)


def test_what_the_run_itself_leaves_in_its_folder_moves_on_into_the_new_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "a").write_text("old")
    (target / "report.json").write_text("{}")
    with open(target / "job.log", "w") as log:
        log.write("before\n")
        check_replaceable(target, KNOWN)
        with whole_folder(target, KNOWN) as draft:
            (draft / "b").write_text("new")
        log.write("after\n")
    assert names(tmp_path) == ["model/b", "model/job.log", "model/report.json"]
    assert (target / "job.log").read_text() == "before\nafter\n"
