"""Which nodes work runs on: the `cluster` section translated to Ray's options.

    data, train = Placement.data(config.cluster), Placement.train(config.cluster)
    ray.remote(**data.remote_options())(function)                    # a task; Ray Data's `map_batches` takes the same
    tune.with_resources(trainable, train.trial_resources(gpus=1))
    ScalingConfig(num_workers=8, **train.scaling(gpus=1))

Without these settings work may run on any node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

from raytrain.config import ClusterSection
from raytrain.config.selectors import accelerator_of, accelerator_resource, selects
from raytrain.errors import ConfigError

if TYPE_CHECKING:
    from ray.tune import PlacementGroupFactory

Node = dict[str, Any]  # as `ray.nodes()` returns it
NODE_LABEL = "ray.io/node-id"  # which Ray gives every node


class RemoteOptions(TypedDict, total=False):
    """Options for a task, an actor, or Ray Data's `map_batches`."""

    num_cpus: float
    num_gpus: float
    resources: dict[str, float]
    label_selector: dict[str, str]
    accelerator_type: str


class ScalingOptions(TypedDict):
    """The part of Ray Train's `ScalingConfig` that says which nodes a worker may run on, and what it reserves there."""

    use_gpu: bool
    resources_per_worker: dict[str, float]
    label_selector: dict[str, str] | None
    accelerator_type: str | None


class _Selectors(TypedDict, total=False):
    bundle_label_selector: list[dict[str, str]]


@dataclass(frozen=True)
class Placement:
    """The nodes that one kind of `work` may run on, and what it reserves there in addition to CPUs and GPUs.

    `labels` are selectors (`raytrain.config.selectors`), `resources` are amounts of custom resources per task or worker
    (which has whole GPUs or none), and `cpus` are the CPUs of a training worker.
    """

    work: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    accelerator_type: str | None = None
    cpus: float = 1.0

    @classmethod
    def train(cls, cluster: ClusterSection) -> Placement:
        """Placement of training, batch size probes, and models on GPUs."""
        custom = {name: amount for name, amount in cluster.train_resources.items() if name != "CPU"}
        cpus = cluster.train_resources.get("CPU", 1.0)
        return cls("train", cluster.train_labels, custom, cluster.accelerator_type, cpus)

    @classmethod
    def data(cls, cluster: ClusterSection) -> Placement:
        """Placement of work that needs no GPU."""
        return cls("data", cluster.data_labels, cluster.data_resources)

    def on_node(self, node_id: str) -> Placement:
        """The same work pinned to one node."""
        return replace(self, labels={**self.labels, NODE_LABEL: node_id}, accelerator_type=None)

    # --- for Ray

    def remote_options(self, cpus: float = 1.0, gpus: float = 0.0) -> RemoteOptions:
        """Options for a task, an actor, or Ray Data's `map_batches`."""
        options: RemoteOptions = {"num_cpus": cpus, "num_gpus": gpus}
        if self.resources:
            options["resources"] = dict(self.resources)
        if self.labels:
            options["label_selector"] = dict(self.labels)
        if self.accelerator_type:
            options["accelerator_type"] = self.accelerator_type
        return options

    def trial_resources(self, cpus: float = 1.0, gpus: float = 0.0) -> PlacementGroupFactory:
        """What Ray Tune reserves for a trial of one process."""
        from ray import tune

        return tune.PlacementGroupFactory([self._bundle(cpus, gpus)], **self._selectors(1))

    def group_resources(self, world_size: int, cpus: float = 1.0, gpus: float = 0.0) -> PlacementGroupFactory:
        """What Ray Tune reserves for a trial with `world_size` actors: a small bundle for the trial itself, then one
        per actor."""
        from ray import tune

        bundles = [{"CPU": 0.01}, *(self._bundle(cpus, gpus) for _ in range(world_size))]
        return tune.PlacementGroupFactory(bundles, **self._selectors(len(bundles)))

    def scaling(self, gpus: float = 0.0) -> ScalingOptions:
        """What Ray Train needs to know about its workers' nodes."""
        return {
            "use_gpu": gpus > 0,
            "resources_per_worker": {"CPU": self.cpus, **({"GPU": gpus} if gpus else {}), **self.resources},
            "label_selector": dict(self.labels) or None,
            "accelerator_type": self.accelerator_type,
        }

    def _bundle(self, cpus: float, gpus: float) -> dict[str, float]:
        bundle = {"CPU": cpus, "GPU": gpus, **self.resources}
        if self.accelerator_type:
            bundle[accelerator_resource(self.accelerator_type)] = 0.001
        return bundle

    def _selectors(self, num_bundles: int) -> _Selectors:
        return {"bundle_label_selector": [dict(self.labels)] * num_bundles} if self.labels else {}

    # --- the cluster

    def nodes(self) -> list[Node]:
        """The nodes that are up and match. Raises `ConfigError` if settings match no node: Ray would wait for one
        silently."""
        present = self.present()
        if present or not (self.labels or self.resources or self.accelerator_type):
            return present
        names = ["labels", "resources"]
        settings = [f"{self.work}_{name} {dict(getattr(self, name))}" for name in names if getattr(self, name)]
        settings += [f"accelerator_type {self.accelerator_type}"] if self.accelerator_type else []
        raise ConfigError(
            f"no node of the cluster matches the cluster section's settings for {self.work}",
            got=", ".join(sorted({_described(node) for node in alive()})),
            allowed=" and ".join(settings),
            remedy="start nodes with these (ray start --labels, --resources), or change the settings",
        )

    def present(self) -> list[Node]:
        """The nodes that are up and match; may be empty."""
        return [node for node in alive() if self._has_labels(node) and self._has_resources(node)]

    def slots(self, node: Node, cpus: float = 1.0, gpus: float = 0.0) -> int:
        """How many tasks or workers a matching node has room for."""
        taken = {"CPU": cpus, "GPU": gpus, **self.resources}
        available = node["Resources"]
        return int(min(available.get(name, 0.0) / amount + 1e-6 for name, amount in taken.items() if amount))

    def misled(self, gpus: float = 0.0) -> list[Node]:
        """Nodes with room for a training worker but the wrong labels. If `num_workers` is a range, Ray Train counts
        them too, since its reservations consider only resources."""
        return [
            node
            for node in alive()
            if not self._has_labels(node) and self._has_resources(node) and self.slots(node, self.cpus, gpus)
        ]

    def _has_labels(self, node: Node) -> bool:
        labels = node.get("Labels") or {}
        return all(selects(selector, labels.get(key)) for key, selector in self.labels.items())

    def _has_resources(self, node: Node) -> bool:
        available = node["Resources"]
        kind_fits = self.accelerator_type is None or accelerator_resource(self.accelerator_type) in available
        return kind_fits and all(available.get(name, 0.0) >= amount for name, amount in self.resources.items())


ANYWHERE = Placement()


def alive() -> list[Node]:
    """The nodes that are up."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def total(nodes: list[Node], resource: str) -> float:
    """The nodes' total amount of a resource."""
    return sum(node["Resources"].get(resource, 0.0) for node in nodes)


def _described(node: Node) -> str:
    labels = {key: value for key, value in (node.get("Labels") or {}).items() if not key.startswith("ray.io/node-id")}
    kind = accelerator_of(node["Resources"])
    builtin = ("CPU", "GPU", "TPU", "memory", "object_store_memory")
    custom = [name for name in node["Resources"] if name not in builtin and ":" not in name]
    parts = [f"{key}={value}" for key, value in sorted(labels.items())] + sorted(custom) + ([kind] if kind else [])
    return f"a node with {', '.join(parts) or 'neither labels nor resources'}"
