"""`raytrain ablate`: the paper's batching schemes on your own corpus, by prediction or by training.

By prediction: the corpus' length histogram and a model's traced memory yield padding, batch sizes, memory in use, and
the GPUs and hours that each scheme needs. By training: each scheme gets its own buckets, batch sizes and assignment,
and a training run per learning rate as a Ray Tune trial; everything else is equal. Each writes an artifact that
`report.html` draws (`raytrain.report.ablation_results`), and the same command resumes an interrupted ablation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

from raytrain.cluster.session import ray_session
from raytrain.config import Config
from raytrain.console import Console
from raytrain.errors import ConfigError
from raytrain.experiments.outcomes import best_trials, read_outcome
from raytrain.experiments.prediction import SchemePlan, SchemeSimulator, fit_limits, trace_surface
from raytrain.experiments.trial_runs import (
    PlannedTrial,
    TrialEnd,
    histogram_of,
    prepare_run,
    train_trials,
    training_limits,
)
from raytrain.lengths.histogram import LengthHistogram
from raytrain.lengths.schemes import SCHEMES, Hardware, SchemeRow, gpu_plans, random_batch, scheme_settings, title_of
from raytrain.model.config import ModelConfig
from raytrain.model.cost import peak_flops
from raytrain.report.ablation_results import AblationBody, ModelPrediction, PredictedBody, TrialResult
from raytrain.report.page import write_report
from raytrain.run_folder.documents import PROFILE_FORMAT, ProfileBody
from raytrain.run_folder.trial_folder import check_on_disk
from raytrain.run_folder.workspace import Workspace
from raytrain.storage.artifacts import read_json, write_json
from raytrain.storage.ownership import owned
from raytrain.storage.run_files import BATCH_PROFILE, REPORT
from raytrain.storage.run_store import RunStore
from raytrain.tracking.runs import RunTracking
from raytrain.training.memory.surface import MemorySurface
from raytrain.training.settings import TrainSettings

PREDICTED_FORMAT = "raytrain.ablation_predicted/1"
ABLATION_FORMAT = "raytrain.ablation/1"
GIB = 2**30


# --- by prediction


@dataclass(frozen=True)
class PredictOptions:
    """What to predict for: a GPU by name and memory, the share of its peak that steps reach, the fixed cost of a step,
    and the `gpus` and `steps` of the baseline, scheme A."""

    gpu: str = "A100"
    memory_gib: float = 80.0
    utilisation: float = 0.4
    overhead_seconds: float = 0.1
    gpus: int = 128
    steps: int = 150_000
    batch_seconds: float = 360.0

    def hardware(self) -> Hardware:
        """Raises `ConfigError` for a GPU whose peak speed is not listed."""
        peak = peak_flops(self.gpu)
        if peak is None:
            raise ConfigError(
                "the peak speed of this GPU is not listed",
                got=self.gpu,
                allowed="A100, H100, …",
                remedy="choose one of these with --gpu; raytrain/model/cost.py lists them all",
            )
        return Hardware(self.gpu, self.memory_gib, peak, self.utilisation, self.overhead_seconds)


def predict_ablation(
    config: Config,
    console: Console,
    models: Mapping[str, ModelConfig],
    options: PredictOptions,
    take_over: bool = False,
) -> PredictedBody:
    """The table of all schemes for each model, as stored in `ablation_predicted.json`."""
    with owned(config.run_location, console.say, take_over):
        hardware = options.hardware()
        histogram = histogram_of(config, console)
        body = PredictedBody(
            utterances=histogram.total,
            hours=histogram.hours,
            hardware=hardware,
            memory_fraction=config.oomptimize.memory_fraction,
            gpus=options.gpus,
            steps=options.steps,
            batch_seconds=options.batch_seconds,
            models={name: _predict(config, console, histogram, name, model, options) for name, model in models.items()},
        )
        write_json(config.run_dir / "ablation_predicted.json", PREDICTED_FORMAT, asdict(body))
        _report(config, console)
        RunStore(config.run_location).publish()
    return body


def _predict(
    config: Config,
    console: Console,
    histogram: LengthHistogram,
    name: str,
    model: ModelConfig,
    options: PredictOptions,
) -> ModelPrediction:
    settings = fit_limits(replace(config.buckets, max_tokens=2**31), model)
    budget = int(options.memory_gib * GIB * config.oomptimize.memory_fraction)
    trace = partial(trace_surface, histogram, settings, model, TrainSettings(num_workers=8), budget=budget)
    surface = _traced(console, f"tracing {name}", partial(trace, precision="bf16", device_type="cuda"))
    simulator = SchemeSimulator(histogram, settings, model, surface, budget, seed=config.seed)
    rows = [simulator.simulate(simulator.plan(scheme, options.batch_seconds)) for scheme in SCHEMES]
    plans = gpu_plans(rows, options.hardware(), options.gpus, options.steps)
    return ModelPrediction(rows, plans, surface.error, random_batch(histogram, rows[0].batch_sizes[0], config.seed))


def _traced(console: Console, label: str, trace: Callable[..., MemorySurface]) -> MemorySurface:
    """Call a `trace_surface` that lacks only its `on_shape`, with a progress bar."""
    with console.progress(label, None) as update:
        return trace(on_shape=lambda done, total: update(completed=done, total=total))


def _report(config: Config, console: Console) -> None:
    path = write_report(config.run_dir, config.run_dir / REPORT, title=f"raytrain: {config.name}")
    console.say(f"  the figures are in {path}")


# --- by training


def run_ablation(config: Config, console: Console, take_over: bool = False) -> AblationBody:
    """Train every scheme at every learning rate; returns the body of `ablation.json`.

    Raises `ConfigError` without dev manifests or without a limiting memory budget.
    """
    _check_trainable(config)
    config = training_limits(_with_memory(config))
    with (
        owned(config.run_location, console.say, take_over),
        RunTracking(config, config.run_dir) as tracking,
        ray_session(config.cluster),
    ):
        simulator = _simulator(config, console, histogram_of(config, console))
        plans = [simulator.plan(scheme) for scheme in config.ablate.schemes]
        rows = {planned.scheme: simulator.simulate(planned) for planned in plans}
        jobs = [job for planned in plans for job in _prepare(config, console, planned)]
        begun = (config.run_dir / "ablate" / "trials").exists()
        with console.stage("ablate") as finish, tracking.stage("ablate", resumes=begun):
            ends = train_trials(config, console, jobs, tracking.child_id)
            body = _body(config, simulator, rows, jobs, ends)
            write_json(config.run_dir / "ablation.json", ABLATION_FORMAT, asdict(body))
            tracking.current.log_artifact(config.run_dir / "ablation.json")
            finish(_summary(body))
        _report(config, console)
    return body


def _check_trainable(config: Config) -> None:
    check_on_disk(config, "raytrain ablate")
    if not config.data.dev:
        raise ConfigError(
            "an ablation needs data.dev",
            why="schemes are compared by their validation WER",
            remedy="list dev manifests under data.dev, or use --predict",
        )
    if config.data.stream is not None:
        raise ConfigError("an ablation needs an assignment", remedy="unset data.stream")


def _with_memory(config: Config) -> Config:
    """The run's configuration under the ablation's budget: without a limiting budget, all batches would be alike."""
    section = config.ablate
    limits = {
        name: value
        for name, value in (("device_memory", section.device_memory), ("max_batch_size", section.max_batch_size))
        if value is not None
    }
    config = config.model_copy(update={"oomptimize": config.oomptimize.model_copy(update=limits)})
    if config.oomptimize.device_memory is None:
        raise ConfigError("an ablation needs ablate.device_memory", remedy="set it to the memory that a step may use")
    return config


def _simulator(config: Config, console: Console, histogram: LengthHistogram) -> SchemeSimulator:
    model = Workspace(config, config.run_dir).model_config()
    budget = int((config.oomptimize.device_memory or 0) * config.oomptimize.memory_fraction)
    settings = fit_limits(config.buckets, model)
    trace = partial(trace_surface, histogram, settings, model, config.train, budget=budget)
    surface = _traced(console, "tracing", partial(trace, precision="fp32", device_type="cpu"))
    most = config.oomptimize.max_batch_size
    return SchemeSimulator(histogram, config.buckets, model, surface, budget, most, config.seed)


def _prepare(config: Config, console: Console, planned: SchemePlan) -> list[PlannedTrial]:
    """A run folder for a scheme with its batch sizes, and a job per learning rate."""
    scheme = planned.scheme
    console.say(f"  {scheme}: {title_of(scheme)}")
    name, settings = scheme.replace("+", "-plus"), scheme_settings(scheme, config.buckets)
    candidate = prepare_run(config, console, name, {"buckets": settings})
    sized = candidate.run_dir / "batch_profile_sized.json"
    document = read_json(candidate.run_dir / BATCH_PROFILE, PROFILE_FORMAT, ProfileBody)
    document["body"]["profiles"][0]["batch_sizes"] = list(planned.sizes)
    write_json(sized, PROFILE_FORMAT, document["body"], document["parents"])
    files = {BATCH_PROFILE: str(sized)}
    return [
        PlannedTrial(f"{scheme} lr {rate:g}", candidate, {"train.learning_rate": rate}, files, scheme)
        for rate in _rates(config)
    ]


def _rates(config: Config) -> list[float]:
    return config.ablate.learning_rates or [config.train.learning_rate]


def _body(
    config: Config,
    simulator: SchemeSimulator,
    rows: Mapping[str, SchemeRow],
    jobs: list[PlannedTrial],
    ends: list[TrialEnd],
) -> AblationBody:
    target, rates = config.ablate.target_wer, _rates(config)
    first = rows[config.ablate.schemes[0]]
    trials = [_result(job, end, target) for job, end in zip(jobs, ends, strict=True)]
    return AblationBody(
        target_wer=target,
        device_gib=simulator.budget / GIB,
        learning_rates=rates,
        schemes=[rows[scheme] for scheme in SCHEMES if scheme in rows],
        random_batch=random_batch(simulator.histogram, first.batch_sizes[0], config.seed),
        trials=trials,
        best=best_trials(trials),
    )


def _result(job: PlannedTrial, end: TrialEnd, target_wer: float) -> TrialResult:
    outcome = read_outcome(end.folder, target_wer)
    return TrialResult(job.scheme or "", job.label, job.settings["train.learning_rate"], end.why, **vars(outcome))


def _summary(body: AblationBody) -> str:
    best = body.best_trials()
    times = {trial.scheme: trial.seconds_to_target for trial in best if trial.seconds_to_target}
    text = f"{len(body.trials)} training runs of {len(best)} schemes"
    if "R" in times and "D+" in times:
        text += f"; D+ reaches {body.target_wer:.0%} WER in {times['D+'] / times['R']:.0%} of R's time"
    return text
