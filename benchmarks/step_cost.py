"""What a training step costs, by count: kernels, bytes, operations, memory; no GPU is needed.

    python -m benchmarks.step_cost --label after --compare benchmarks/results/step_cost_before_20261128.json
    python -m benchmarks.step_cost --label combined --inductor combo_kernels=true

The real step runs on `meta` tensors as CUDA would run it. Matrix products are bound by arithmetic; all else is bound by
memory, so the bytes that it reads and writes are its time. Compiled blocks are those that inductor would make for an
H100. The sum over kernels at an H200's rates models the step's time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from typing import Any, get_args

from benchmarks._inductor_plan import plan_blocks
from benchmarks._kernel_counts import (
    Cost,
    Costs,
    KernelCounter,
    Origin,
    StepParts,
    by_operator,
    is_product_name,
    launches,
    list_launches,
    summed,
)
from benchmarks._models import SHAPES, config_of
from benchmarks._record import RESULTS, command, machine, result_path, write_document
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig
from raytrain.training.memory.prediction import predict_batch_size
from raytrain.training.memory.tracer import StepTracer, meta_batch
from raytrain.training.settings import TrainSettings

GIB = 2**30
# Measured on an H200 (shared/gpu/README.md): an 8192³ bf16 product, a copy; and about what a kernel takes at least.
FLOPS, BYTES, LAUNCH_SECONDS = 784e12, 3.5e12, 2e-6
# Seconds of the step of 64 x 20 s and 90 tokens of canary-1b-flash on that card at 58118e9. The model gives eager 0.65
# of it, since few kernels reach a copy's rate: modeled seconds are a bound, and their ratio is what to read.
MEASURED = {"eager": 0.422, "encoder blocks compiled for a fixed shape": 0.332}
BLOCKS = {
    "encoder block": ("ConformerBlock", "encoder.layers.0"),
    "decoder block": ("DecoderBlock", "transf_decoder._decoder.layers.0"),
}


def settings_of(**wanted: Any) -> TrainSettings:
    """Settings of those that this version has."""
    names = {field.name for field in fields(TrainSettings)}
    return TrainSettings(**{name: value for name, value in wanted.items() if name in names})


class CountedStep:
    """Costs of an eager step by origin, and inputs of the blocks for the compiler."""

    def __init__(self, config: ModelConfig, batch: int, seconds: float, tokens: int) -> None:
        # With the operators that compiled blocks call too, if this version compiles.
        options = {"compiled": False} if "compiled" in signature(StepTracer).parameters else {}
        tracer = StepTracer(config, settings_of(num_workers=1), precision="bf16", remember=False, **options)
        model = tracer._model  # a step like the tracer's, of which more than the memory is wanted
        self.blocks: dict[str, Any] = {}
        parts = StepParts(_parts(model))
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(self._note(part, name))
            for part, (_, name) in BLOCKS.items()
        ]
        counter = KernelCounter(parts)
        data = meta_batch(config, batch, round(seconds * 1000), tokens)
        with counter:
            tracer._run(data)
        parts.remove()
        for hook in hooks:
            hook.remove()
        counter.join_lists("update", {"linalg_vector_norm": 1, "mul_": 1})
        self.costs = counter.costs
        sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        # Fused AdamW reads weight, gradient and two moments and writes all but the gradient, in float32.
        update = Origin("update", "forward", False, "fused AdamW")
        self.costs[update] = Cost(list_launches(sizes, 4), 7 * 4 * sum(sizes), 0, 1)

    def _note(self, part: str, name: str) -> Callable[..., None]:
        def note(_: object, inputs: tuple[Any, ...]) -> None:
            values = [
                {
                    "shape": list(x.shape),
                    "stride": list(x.stride()),
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "grad": x.requires_grad,
                }
                for x in inputs
            ]
            self.blocks.setdefault(part, {"module": name, "inputs": values})

        return note


def _parts(model: Canary) -> list[tuple[Any, str]]:
    parts: list[tuple[Any, str]] = [(model, "rest of the model")]
    parts += [(model.preprocessor, "features"), (model.spec_augment, "features")]
    parts.append((model.encoder.pre_encode, "subsampling"))
    parts += [(layer, "encoder block") for layer in model.encoder.layers]
    return parts + [(layer, "decoder block") for layer in model.transf_decoder._decoder.layers]


def row(cost: Cost) -> dict[str, float]:
    """Figures of a cost for the report."""
    return {"kernels": cost.kernels, "gib": round(cost.num_bytes / GIB, 3), "tflop": round(cost.flops / 1e12, 4)}


def seconds_of(products: Cost, rest: Cost) -> float:
    """The model of time: products at their rate or, if they are small, at memory's; all else at memory's; and each
    kernel's start and end."""
    arithmetic = max(products.flops / FLOPS, products.num_bytes / BYTES)
    return arithmetic + rest.num_bytes / BYTES + (products.kernels + rest.kernels) * LAUNCH_SECONDS


def block_table(costs: Costs, numbers: dict[str, int], plans: dict[str, Any]) -> dict[str, Any]:
    """For each kind of block, one block's products and rest, forward and backward, eager and if planned compiled."""
    table: dict[str, Any] = {}
    for part in BLOCKS:
        for phase in ("forward", "backward"):
            entry: dict[str, Any] = {}
            eager = {name: _of_phase(costs, part, phase, flag, numbers[part]) for name, flag in _CLASSES.items()}
            entry["eager"] = {name: row(cost) for name, cost in eager.items()}
            if part in plans:
                entry["compiled"] = {name: row(cost) for name, cost in _planned(plans[part][phase], eager).items()}
            table[f"{part}, {phase}"] = entry
    return table


_CLASSES = {"products": True, "rest": False}


def _of_phase(costs: Costs, part: str, phase: str, is_product: bool, number: int) -> Cost:
    total = summed(costs, lambda origin: (origin.part, origin.phase, origin.is_product) == (part, phase, is_product))
    return Cost(total.kernels // number, total.num_bytes // number, total.flops // number)


def _planned(kernels: list[dict[str, Any]], eager: dict[str, Cost]) -> dict[str, Cost]:
    """A plan's kernels in the same classes; its products' operations are those of the eager block."""
    costs = {"products": Cost(flops=eager["products"].flops), "rest": Cost()}
    for kernel in kernels:
        name = "products" if kernel["extern"] and is_product_name(kernel["name"]) else "rest"
        costs[name].add(Cost(launches(kernel["name"]) if kernel["extern"] else 1, kernel["bytes"]))
    return costs


def compiled_step(costs: Costs, numbers: dict[str, int], plans: dict[str, Any]) -> dict[str, Cost]:
    """The whole step with compiled blocks: these from their plans, all else eager."""
    totals = {
        name: summed(costs, lambda origin, flag=flag: origin.is_product == flag and origin.part not in plans)
        for name, flag in _CLASSES.items()
    }
    for part, plan in plans.items():
        for phase in ("forward", "backward"):
            eager = {name: _of_phase(costs, part, phase, flag, numbers[part]) for name, flag in _CLASSES.items()}
            for name, cost in _planned(plan[phase], eager).items():
                for _ in range(numbers[part]):
                    totals[name].add(cost)
    return totals


def step_figures(products: Cost, rest: Cost) -> dict[str, Any]:
    """Kernels and bytes of a step, and the time that the model gives it."""
    seconds = seconds_of(products, rest)
    return {
        "products": row(products),
        "rest": row(rest),
        "kernels": products.kernels + rest.kernels,
        "modeled_seconds": round(seconds, 4),
        "share_of_product_rate": round(products.flops / FLOPS / seconds, 3),
    }


def memory(config: ModelConfig, batch: int, seconds: float, tokens: int) -> dict[str, Any]:
    """Traced peak of the batch, and the largest batch in 80 GiB, by what this version can compute twice."""
    figures: dict[str, Any] = {}
    for mode in _checkpointing_modes():
        tracer = StepTracer(config, settings_of(activation_checkpointing=mode, num_workers=1), precision="bf16")
        edge = (round(seconds * 1000), tokens)
        peak = tracer.trace(batch, *edge).peak_bytes
        largest = predict_batch_size(tracer, *edge, 80 * GIB, 4096).batch_size
        figures[str(mode)] = {"peak_gib": round(peak / GIB, 2), "largest_batch_in_80_gib": largest}
    return figures


def _checkpointing_modes() -> list[Any]:
    try:
        from raytrain.model.checkpointing import Checkpointing
    except ImportError:
        return [False, True]
    return list(get_args(Checkpointing))


def measure(
    config: ModelConfig,
    batch: int,
    seconds: float,
    tokens: int,
    *,
    planned: Iterable[str] = (),
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Counts for one model and batch, with plans of these kinds of blocks by inductor with these options."""
    step = CountedStep(config, batch, seconds, tokens)
    numbers = {"encoder block": config.encoder_layers, "decoder block": config.decoder_layers, "subsampling": 1}
    plans = {}
    if blocks := {part: step.blocks[part] for part in planned}:
        model = {name: value for name, value in asdict(config).items() if name != "spec_augment"}
        plans = plan_blocks({"model": model, "blocks": blocks, "options": options or {}})
    rest = {origin: cost for origin, cost in step.costs.items() if not origin.is_product}
    products = {origin: cost for origin, cost in step.costs.items() if origin.is_product}
    steps = {"eager": step_figures(summed(products), summed(rest))}
    if plans:
        steps["compiled"] = step_figures(**compiled_step(step.costs, numbers, plans))
    return {
        "steps": steps,
        "a_block": block_table(step.costs, numbers, plans),
        "eager_rest_by_part": _by(rest, lambda origin: f"{origin.part}, {origin.phase}"),
        "eager_rest_by_operator": {
            name: {"calls": cost.calls, **row(cost)} for name, cost in list(by_operator(rest).items())[:20]
        },
        "compiled_kernels": plans,
    }


def _by(costs: Costs, key: Callable[[Origin], str]) -> dict[str, Any]:
    names = dict.fromkeys(map(key, costs))
    return {name: row(summed(costs, lambda origin, name=name: key(origin) == name)) for name in names}


def columns_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What the table shows of a result, by kind of step; training runs the last, whose memory it is."""
    columns = {f"{kind} ({result['commit']})": _figures(result, kind) for kind in result["steps"]}
    last = list(columns.values())[-1]
    for mode, values in result.get("memory", {}).items():
        name = {"False": "none", "True": "full"}.get(mode, mode)
        last[f"recompute {name}: peak GiB"] = values["peak_gib"]
        last[f"recompute {name}: batch in 80 GiB"] = values["largest_batch_in_80_gib"]
    return columns


def _figures(result: dict[str, Any], kind: str) -> dict[str, float]:
    step = result["steps"][kind]
    shown: dict[str, float] = {
        "kernels": step["kernels"],
        "kernels, no products": step["rest"]["kernels"],
        "GiB moved, no products": step["rest"]["gib"],
        "TFLOP of products": step["products"]["tflop"],
        "modeled seconds": step["modeled_seconds"],
        "share of the products' rate": step["share_of_product_rate"],
    }
    for name, entry in result["a_block"].items():
        if kind in entry:
            cost = entry[kind]
            shown[f"{name}: kernels"] = cost["products"]["kernels"] + cost["rest"]["kernels"]
            shown[f"{name}: of these no products"] = cost["rest"]["kernels"]
            shown[f"{name}: GiB moved, no products"] = cost["rest"]["gib"]
    return shown


def table(columns: dict[str, dict[str, float]]) -> Iterable[str]:
    """Lines with a row for each figure of any column, and the last column's as a part of the first's."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    width = max(map(len, names))
    yield " " * width + "".join(f"{title:>22}" for title in columns) + ("     ratio" if len(columns) > 1 else "")
    for name in names:
        values = [column.get(name) for column in columns.values()]
        cells = "".join(f"{'-' if value is None else format(value, ',')!s:>22}" for value in values)
        first, last = values[0], values[-1]
        ratio = f"{last / first:>10.2f}" if len(values) > 1 and first and last else ""
        yield f"{name:<{width}}{cells}{ratio}"


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="canary-1b-flash", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=90)
    parser.add_argument("--label", default="now", help="name of the result file: step_cost_<label>_<date>.json")
    parser.add_argument("--without-plan", action="store_true", help="no compiled blocks")
    parser.add_argument("--inductor", nargs="*", default=[], metavar="OPTION=JSON", help="e.g. combo_kernels=true")
    parser.add_argument("--compare", type=Path, help="a result to show beside this one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    compiles = any(field.name == "compile" for field in fields(TrainSettings)) and not arguments.without_plan
    options = {name: json.loads(value) for name, value in (option.split("=", 1) for option in arguments.inductor)}
    shape = {"batch": arguments.batch, "seconds": arguments.seconds, "tokens": arguments.tokens}
    result = {"model": arguments.model, **shape, "commit": _commit()}
    if options:
        result["inductor"] = options
    result |= measure(config_of(arguments.model), **shape, planned=BLOCKS if compiles else (), options=options)
    result["memory"] = memory(config_of(arguments.model), **shape)
    path = result_path("step_cost", arguments.label)
    document = {"theme": "step_cost", "command": command(), "machine": machine(), "result": result}
    write_document(path, document)
    if arguments.json:
        print(json.dumps(document))
        return
    columns = columns_of(json.loads(arguments.compare.read_text())["result"]) if arguments.compare else {}
    columns |= columns_of(result)
    print(f"{arguments.model}, {arguments.batch} x {arguments.seconds:g} s, {arguments.tokens} tokens, bf16")
    print("\n".join(table(columns)))
    if (arguments.model, *shape.values()) == ("canary-1b-flash", 64, 20, 90):
        print("measured on an H200 at 58118e9:", ", ".join(f"{name} {seconds} s" for name, seconds in MEASURED.items()))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
