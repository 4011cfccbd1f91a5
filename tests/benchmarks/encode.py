"""`refresh` on real histories against sentence-transformers' `encode`, items a second.

Ours: from the moment the encoder is loaded to the commit that publishes the vectors, by the job as it is: reading,
de-duplicating, packing, encoding, writing and committing. Theirs: `encode` alone, model loaded, texts in a list, at the
batch size and dtype that are quickest here.
"""

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.refresh import embed
from pplug.encoder import EncoderConfig, TextEncoder, default_batch_tokens
from tests.benchmarks import prepare
from tests.benchmarks.encoder import flops
from tests.benchmarks.measure import Found, Given, Line, best_rate, gpus, in_turn, matmul_rate

READY = "PPLUG_BENCH_READY"
LEAST, AIM = 2.0, 2.5


class TimedEmbed(embed.EmbedTexts):
    """EmbedTexts that says when it is ready."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.encoder.encode(["warm"])
        Path(os.environ[READY]).write_text(repr(time.time()))


class Refresh:
    """The job, from nothing, on a copy of the histories."""

    def __init__(self, population: prepare.Population, folder: Path) -> None:
        self.population, self.folder, self.whole = population, folder, list[float]()
        self.items = population.snapshot("histories").rows

    def __call__(self) -> float:
        from pipelines.refresh import job as refresh

        place = self.folder / "encode-tables"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(f"{self.population.tables}/histories", place / "histories")
        run_dir = str(self.folder / "encode-run")
        config = refresh.Config(tables=str(place), run_dir=run_dir, gpus_per_worker=gpus())
        start = time.time()
        assert refresh.run(config) == 0
        self.whole.append(self.items / (time.time() - start))
        commits = list(place.glob("embeddings-*/_delta_log/*.json"))
        published = max(path.stat().st_mtime for path in commits)
        return self.items / (published - float(Path(os.environ[READY]).read_text()))


class SentenceTransformers:
    """The peer, loaded; `encode` of all texts."""

    def __init__(self, texts: list[str], threads: int) -> None:
        import torch
        from sentence_transformers import SentenceTransformer

        from infra.device import assigned
        from pplug.encoder import MINILM, best_dtype
        from pplug.identity import model_folder

        torch.set_num_threads(threads)
        self.texts = texts
        best = best_dtype("auto", assigned())
        kinds = {"float32": torch.float32, str(best).removeprefix("torch."): best}
        folder = str(model_folder(MINILM, None))
        self.models = {name: SentenceTransformer(folder, model_kwargs={"dtype": kind}) for name, kind in kinds.items()}
        self.setting = best_rate(
            {(name, size): (lambda n=name, s=size: self.rate(texts[:128], n, s)) for name in kinds for size in SIZES}
        )

    def rate(self, texts: list[str], dtype: str, batch_size: int) -> float:
        start = time.perf_counter()
        self.models[dtype].encode(texts, batch_size=batch_size, show_progress_bar=False)
        return len(texts) / (time.perf_counter() - start)

    def __call__(self) -> float:
        return self.rate(self.texts, *self.setting)


SIZES = (8, 16, 32, 64, 128)


def bound_rate(encoder: TextEncoder, texts: list[str]) -> float:
    """Texts a second if the encoder were nothing but matrix products at the machine's rate."""
    lengths = np.array([len(ids) for ids in encoder.tokenize(texts)])
    return len(texts) * matmul_rate(encoder.dtype) / flops(encoder.model.config, lengths)


def run(given: Given) -> Found:
    from infra import session

    users = prepare.people(given)
    os.environ[READY] = str(given.folder / "encode-ready")  # before Ray starts: its workers inherit it
    session.start(cpus=4, object_store_bytes=512 * 2**20)
    embed.EmbedTexts = TimedEmbed  # type: ignore[misc]
    population = prepare.ingested(given.folder, users)
    texts = population.texts()
    ours, theirs = Refresh(population, given.folder), SentenceTransformers(texts, given.threads)
    Refresh(prepare.ingested(given.folder, 4), given.folder)()  # warm, as the peer is by now
    found = in_turn({"refresh": ours, "sentence-transformers": theirs}, given.rounds)
    session.stop()
    dtype, size = theirs.setting
    peer = f"sentence-transformers encode ({dtype}, batch {size})"
    encoder = TextEncoder(EncoderConfig())
    own, bound = encoder.config, bound_rate(encoder, texts)
    config = {
        "data": population.data,
        "items": len(texts),
        "different": len(set(texts)),
        "characters an item": round(statistics.mean(map(len, texts))),
        "encoder": own.model,
        "our dtype": str(encoder.dtype).removeprefix("torch."),
        "batch_tokens": default_batch_tokens(encoder.device, encoder.dtype, own.max_tokens),
        "threads": given.threads,
    }
    line = Line("refresh, encoding", peer, "items/s", *found.values(), least=LEAST, aim=AIM)
    times = bound / statistics.median(found["sentence-transformers"])
    line.note = f"the matrix products alone would allow {bound:.0f} items/s, {times:.2f} times the peer"
    whole = Line("refresh, with the start of its actors and the personas", peer, "items/s", ours.whole,
                 found["sentence-transformers"])  # fmt: skip
    return Found([line, whole], config)
