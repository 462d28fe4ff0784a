"""Stage `evaluate`: decode the test manifests with a pool of Ray Data actors.

Output rows keep the manifests' order. A recording that can't be read gets an error instead of a hypothesis,
is counted, and stays out of the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from raytrain.config import Config
from raytrain.training.evaluation import count_errors


class Transcriber:
    """A Ray Data actor: holds one model and turns batches of rows into hypotheses."""

    def __init__(self, config: dict[str, Any], run_dir: str, checkpoint: str, cuda: bool, threads: int) -> None:
        import torch

        from raytrain.cluster.workspace import Workspace
        from raytrain.config import check_config
        from raytrain.model.canary import Canary
        from raytrain.training.checkpoint import CheckpointFolder

        self.workspace = Workspace(check_config(config), Path(run_dir))
        self.device = torch.device("cuda" if cuda else "cpu")
        if not cuda:
            torch.set_num_threads(threads)
        folder = CheckpointFolder(self.workspace.path("checkpoints"))
        found = folder.best() if checkpoint == "best" else folder.newest()
        model = Canary(self.workspace.model_config())
        model.load_state_dict(found.load_weights())
        self.model = model.to(self.device).eval()
        self.search = self.workspace.search()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        """`batch["row"]`: JSON rows as `Row` fields with `id`; returns JSON hypotheses in the same order."""
        import torch

        from raytrain.data.assignment import Row
        from raytrain.data.loader import read_rows
        from raytrain.model.decoding import transcribe_batch

        items = [orjson.loads(text) for text in batch["row"]]
        found: dict[Row, str] = {}
        errors: dict[Row, str] = {}
        rows = [Row(**{**item["row"], "tokens": tuple(item["row"]["tokens"])}) for item in items]
        settings, tokenizer = self.workspace.config, self.workspace.tokenizer
        with torch.inference_mode():
            for kept, speech in read_rows(
                rows,
                settings.model.sample_rate,
                tokenizer.pad_id,
                len(rows),
                lambda row, e: errors.update({row: str(e)}),
            ):
                speech = speech.to(self.device)
                best = transcribe_batch(self.model, speech, tokenizer.eos_id, self.search)
                found.update(zip(kept, (tokenizer.decode(one[0].ids) for one in best), strict=True))
        return {
            "result": [
                orjson.dumps(_result(item["id"], row, self.workspace.is_translation(row), found, errors))
                for item, row in zip(items, rows, strict=True)
            ]
        }


def _result(identity: int, row: Any, translated: bool, found: dict, errors: dict) -> dict[str, Any]:
    result = {
        "id": identity,
        "audio_filepath": row.audio_path,
        "duration_ms": row.duration_ms,
        "lang": row.language,
        "translated": translated,
        "text": row.text,
    }
    if row in errors:
        return {**result, "hypothesis": None, "error": errors[row]}
    hypothesis = found[row]
    return {**result, "hypothesis": hypothesis, "wer": round(count_errors([row.text], [hypothesis]).rate, 6)}


def transcribe_rows(config: Config, run_dir: Path, rows: list[Any]) -> Iterator[dict[str, Any]]:
    """Hypotheses of test rows in their order, from a Ray Data actor pool."""

    import ray
    from ray.data import ActorPoolStrategy

    cuda = config.train.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    cpus = int(ray.cluster_resources().get("CPU", 1))
    workers = config.evaluate.num_workers
    items = [{"row": orjson.dumps({"id": i, "row": row._asdict()})} for i, row in enumerate(rows)]
    arguments = {
        "config": config.model_dump(mode="json"),
        "run_dir": str(run_dir),
        "checkpoint": config.evaluate.checkpoint,
        "cuda": cuda,
        "threads": max(1, cpus // workers),
    }
    dataset = ray.data.from_items(items).map_batches(
        Transcriber,
        fn_constructor_kwargs=arguments,
        batch_size=config.evaluate.batch_size,
        compute=ActorPoolStrategy(size=workers),
        # Ray Data hangs without a word where the actors take every CPU; reading needs a share.
        num_cpus=0.5,
        num_gpus=1 if cuda else 0,
    )
    for result in dataset.iter_rows():
        yield orjson.loads(result["result"])
