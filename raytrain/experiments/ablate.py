"""`raytrain ablate`: the paper's batching schemes on one's own corpus, by prediction or by training.

By prediction: the corpus' length histogram and a model's traced memory give padding, batch sizes, memory in use and the
GPUs and hours that each scheme needs. By training: each scheme gets its own buckets, batch sizes and assignment, and a
training run for each learning rate as a Ray Tune trial; all else is equal. Both write `ablation.json` parts that
`report.html` draws, and a stopped ablation goes on where it was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raytrain.cluster.session import ray_session
from raytrain.cluster.trials import run_grid
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import ConfigError
from raytrain.experiments.prediction import SchemePlan, fit_limits, plan_scheme, predict_schemes, trace_surface
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.schemes import (
    SCHEMES,
    Hardware,
    gpu_plans,
    random_batch,
    scheme_settings,
    simulate_scheme,
    title_of,
)
from raytrain.model.cost import cost_of, peak_flops
from raytrain.run_folder.documents import PROFILE_FORMAT, ProfileBody
from raytrain.run_folder.histograms import read_histogram
from raytrain.run_folder.trial_folder import check_on_disk
from raytrain.run_folder.workspace import Workspace
from raytrain.stages.pipeline import read_stages, run_pipeline, write_stages
from raytrain.storage.artifacts import make_folder, read_json, write_json
from raytrain.storage.ownership import owned, owning
from raytrain.storage.run_store import RunStore
from raytrain.tracking import read_metrics
from raytrain.tracking.runs import RunTracking, tracking_uri
from raytrain.training.settings import TrainSettings

PREDICTED_FORMAT = "raytrain.ablation_predicted/1"
ABLATION_FORMAT = "raytrain.ablation/1"
GIB = 2**30


@dataclass(frozen=True)
class PredictOptions:
    """What to predict for: a GPU by name and memory, what it reaches of its peak and what a step costs whatever its
    batch, and the training of scheme A that others are compared with: `gpus` and `steps`."""

    gpu: str = "A100"
    memory_gib: float = 80.0
    utilisation: float = 0.4
    overhead_seconds: float = 0.1
    gpus: int = 128
    steps: int = 150_000
    batch_seconds: float = 360.0

    def hardware(self) -> Hardware:
        """Raises `ConfigError` for a GPU whose peak is not known."""
        peak = peak_flops(self.gpu)
        if peak is None:
            raise ConfigError(
                "nobody told this program what such a GPU can do",
                got=self.gpu,
                allowed="A100, H100, …",
                remedy="name one of these with --gpu; raytrain/model/cost.py lists them all",
            )
        return Hardware(self.gpu, self.memory_gib, peak, self.utilisation, self.overhead_seconds)


def histogram_of(config: Config, console: Console) -> LengthHistogram:
    """The corpus' lengths; counts them where that was not done."""
    run_pipeline(config, console, ("statistics",))
    return read_histogram(config.run_dir / "histogram.parquet")


@owning
def predict_ablation(
    config: Config, console: Console, models: dict[str, Any], options: PredictOptions
) -> dict[str, Any]:
    """The table of all schemes for each model, as `ablation_predicted.json` keeps it."""
    hardware = options.hardware()
    histogram = histogram_of(config, console)
    budget = int(options.memory_gib * GIB * config.oomptimize.memory_fraction)
    train = TrainSettings(num_workers=8)
    body: dict[str, Any] = {
        "utterances": histogram.total,
        "hours": histogram.hours,
        "hardware": asdict(hardware),
        "memory_fraction": config.oomptimize.memory_fraction,
        "gpus": options.gpus,
        "steps": options.steps,
        "batch_seconds": options.batch_seconds,
        "models": {},
    }
    for name, model in models.items():
        settings = fit_limits(replace(config.buckets, max_tokens=2**31), model)
        with console.progress(f"tracing {name}", None) as update:
            surface = trace_surface(
                histogram,
                settings,
                model,
                train,
                precision="bf16",
                device_type="cuda",
                budget=budget,
                on_shape=lambda done, total, update=update: update(completed=done, total=total),
            )
        rows = predict_schemes(
            histogram, settings, model, surface, budget, batch_seconds=options.batch_seconds, seed=config.seed
        )
        body["models"][name] = {
            "schemes": [asdict(row) for row in rows],
            "gpu_plans": [asdict(one) for one in gpu_plans(rows, hardware, options.gpus, options.steps)],
            "memory_fit_error": surface.error,
            "random_batch": random_batch(histogram, rows[0].batch_sizes[0], config.seed),
        }
    write_json(config.run_dir / "ablation_predicted.json", PREDICTED_FORMAT, body)
    _report(config, console)
    RunStore(config.run_location).publish()
    return body


def _report(config: Config, console: Console) -> None:
    from raytrain.report.page import write_report

    path = write_report(config.run_dir, config.run_dir / "report.html", title=f"raytrain: {config.name}")
    console.say(f"  the figures are in {path}")


# --- by training


def run_ablation(config: Config, console: Console, take_over: bool = False) -> dict[str, Any]:
    """Train every scheme at every learning rate; returns what `ablation.json` keeps.

    Raises `ConfigError` without dev manifests and without a memory budget that binds.
    """
    check_on_disk(config, "raytrain ablate")
    if not config.data.dev:
        raise ConfigError(
            "an ablation needs data.dev",
            why="schemes are compared by their validation WER",
            remedy="list dev manifests under data.dev, or use --predict",
        )
    if config.data.stream is not None:
        raise ConfigError("an ablation needs an assignment", remedy="unset data.stream")
    section = config.ablate
    config = _with_limits(config)
    with (
        owned(config.run_location, console.say, take_over),
        RunTracking(config, config.run_dir) as tracking,
        ray_session(config.cluster),
    ):
        histogram = histogram_of(config, console)
        workspace = Workspace(config, config.run_dir)
        model = workspace.model_config()
        budget = int((config.oomptimize.device_memory or 0) * config.oomptimize.memory_fraction)
        with console.progress("tracing", None) as update:
            surface = trace_surface(
                histogram,
                fit_limits(config.buckets, model),
                model,
                config.train,
                precision="fp32",
                device_type="cpu",
                budget=budget,
                on_shape=lambda done, total: update(completed=done, total=total),
            )
        cost, rows, jobs = cost_of(model), {}, []
        for scheme in section.schemes:
            one = plan_scheme(
                scheme, histogram, config.buckets, model, surface, budget, most=config.oomptimize.max_batch_size
            )
            rows[scheme] = simulate_scheme(
                scheme,
                histogram,
                one.plan,
                one.sizes,
                cost,
                surface,
                budget,
                batch_seconds=one.batch_seconds,
                seed=config.seed,
            )
            jobs += _prepare(config, console, one)
        with console.stage("ablate") as finish, tracking.stage("ablate", goes_on=_begun(config)):
            trials = run_grid(config, console, jobs, config.run_dir / "ablate", tracking.child_id)
            body = {
                "target_wer": section.target_wer,
                "device_gib": budget / GIB,
                "learning_rates": _rates(config),
                "schemes": [asdict(rows[scheme]) for scheme in SCHEMES if scheme in rows],
                "random_batch": random_batch(histogram, next(iter(rows.values())).batch_sizes[0], config.seed),
                "trials": [_trial(trial, section.target_wer) for trial in trials],
            }
            body["best"] = best_trials(body["trials"])
            write_json(config.run_dir / "ablation.json", ABLATION_FORMAT, body)
            tracking.current.log_artifact(config.run_dir / "ablation.json")
            finish(_summary(body))
        _report(config, console)
    return body


def _rates(config: Config) -> list[float]:
    return config.ablate.learning_rates or [config.train.learning_rate]


def _begun(config: Config) -> bool:
    return (config.run_dir / "ablate" / "trials").exists()


def _with_limits(config: Config) -> Config:
    """The run's configuration under the ablation's budget: without one that binds, all batches would be alike."""
    section = config.ablate
    limits = {
        name: value
        for name, value in (("device_memory", section.device_memory), ("max_batch_size", section.max_batch_size))
        if value is not None
    }
    config = config.model_copy(update={"oomptimize": config.oomptimize.model_copy(update=limits)})
    if config.oomptimize.device_memory is None:
        raise ConfigError("an ablation needs ablate.device_memory", remedy="name the memory that a step may take")
    return training_limits(config)


def training_limits(config: Config) -> Config:
    """The run's configuration with the ablation's ends of training; each validation saves, which is enough."""
    section = config.ablate
    names = ("max_minutes", "max_steps", "validate_every_steps")
    train = {name: getattr(section, name) for name in names if getattr(section, name) is not None}
    train |= {"stop_at_wer": section.stop_at_wer, "patience": None, "checkpoint_every_steps": 10**9}
    return config.model_copy(update={"train": replace(config.train, **train)})


def prepare_folder(config: Config, console: Console, name: str, update: dict[str, Any]) -> Config:
    """A run folder below `ablate/` with the run's statistics and, for the configuration with `update`, its plan,
    assignment and batch sizes; returns that configuration."""
    values = config.model_dump(mode="json")
    values |= {"name": name, "run": {"root": str(config.run_dir / "ablate")}}
    values["tracking"]["enabled"] = False
    own = Config.model_validate(values).model_copy(update=update)
    _share_statistics(config.run_dir, make_folder(own.run_dir))
    run_pipeline(own, console, ("buckets", "assign", "oomptimize"))
    return own


def _prepare(config: Config, console: Console, one: SchemePlan) -> list[dict[str, Any]]:
    """A run folder of a scheme, and a job for each learning rate."""
    console.say(f"  {one.scheme}: {title_of(one.scheme)}")
    name = one.scheme.replace("+", "-plus")
    scheme = prepare_folder(config, console, name, {"buckets": scheme_settings(one.scheme, config.buckets)})
    folder = scheme.run_dir
    sized = folder / "batch_profile_sized.json"
    document = read_json(folder / "batch_profile.json", PROFILE_FORMAT, ProfileBody)
    document["body"]["profiles"][0]["batch_sizes"] = list(one.sizes)
    write_json(sized, PROFILE_FORMAT, document["body"], document["parents"])
    return [
        {
            "label": f"{one.scheme} lr {rate:g}",
            "scheme": one.scheme,
            "config": {**scheme.model_dump(mode="json"), "tracking": config.tracking.model_dump(mode="json")},
            "run_dir": str(folder),
            "files": {"batch_profile.json": str(sized)},
            "settings": {"train.learning_rate": rate},
            "tracking_uri": tracking_uri(config, config.run_dir),
        }
        for rate in _rates(config)
    ]


def _share_statistics(source: Path, target: Path) -> None:
    """What all schemes have in common, and the note that it is done."""
    for name in ("tokenizer", "histogram.parquet", "statistics.json", "chunks.json"):
        if not (target / name).exists():
            (target / name).symlink_to(source / name)
    shared = {name: record for name, record in read_stages(source).items() if name == "statistics"}
    write_stages(target, {**read_stages(target), **shared})


def _trial(trial: dict[str, Any], target: float) -> dict[str, Any]:
    return {
        "scheme": trial["job"]["scheme"],
        "label": trial["job"]["label"],
        "learning_rate": trial["job"]["settings"]["train.learning_rate"],
        "why": trial["why"],
        **trial_metrics(trial, target),
    }


def trial_metrics(trial: dict[str, Any], target: float) -> dict[str, Any]:
    """What a trial's metrics say: how far it came, when it was at the target WER, means over its steps, its curve."""
    path = Path(trial["folder"] or "") / "metrics.jsonl"
    lines = read_metrics(path)
    means = ("batch_size", "audio_padding", "token_padding", "audio_seconds_per_second", "steps_per_second")
    steps = [line for line in lines if {"loss", "time_s", *means} <= line.keys()]
    checks = [line for line in lines if {"wer", "val_loss", "time_s"} <= line.keys()]
    reached = next((line for line in checks if line["wer"] <= target), None)
    return {
        "steps": steps[-1]["step"] if steps else 0,
        "seconds": checks[-1]["time_s"] if checks else None,
        "best_wer": min((line["wer"] for line in checks), default=None),
        "seconds_to_target": reached["time_s"] if reached else None,
        "steps_to_target": reached["step"] if reached else None,
        "memory_gib": max((line["memory_gib"] for line in steps if "memory_gib" in line), default=None),
        **{name: sum(line[name] for line in steps) / len(steps) if steps else None for name in means},
        "curve": [
            {"step": line["step"], "seconds": line["time_s"], "wer": line["wer"], "val_loss": line.get("val_loss")}
            for line in checks
        ],
    }


def best_trials(trials: list[dict[str, Any]]) -> dict[str, int]:
    """The trial of each scheme that was first at the target, else the one with the lowest WER, by its place."""

    def rank(place: int) -> tuple[float, float]:
        one = trials[place]
        seconds, wer = one["seconds_to_target"], one["best_wer"]
        return (float("inf") if seconds is None else seconds, float("inf") if wer is None else wer)

    found: dict[str, int] = {}
    for place, trial in enumerate(trials):
        scheme = trial["scheme"]
        if scheme not in found or rank(place) < rank(found[scheme]):
            found[scheme] = place
    return found


def _summary(body: dict[str, Any]) -> str:
    chosen = {scheme: body["trials"][place] for scheme, place in body["best"].items()}
    times = {name: one["seconds_to_target"] for name, one in chosen.items() if one["seconds_to_target"]}
    text = f"{len(body['trials'])} trainings of {len(chosen)} schemes"
    if "R" in times and "D+" in times:
        text += f"; D+ reaches {body['target_wer']:.0%} WER in {times['D+'] / times['R']:.0%} of R's time"
    return text
