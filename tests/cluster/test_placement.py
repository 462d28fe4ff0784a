"""Where work runs: on the nodes that the configuration names, on a separate cluster with a node of each kind."""

import json
import os
import subprocess
import sys

import pytest
from conftest import tiny_values

from raytrain.cluster import placement
from raytrain.cluster.ingest import free_cpus
from raytrain.cluster.placement import Placement
from raytrain.cluster.pool import find_pool
from raytrain.config import ClusterSection, check_config
from raytrain.config.selectors import selects
from raytrain.errors import ConfigError

KINDS = {"A100": 80, "T4": 16}  # GiB

CLUSTER = """
import json, sys, time

import ray
from ray.cluster_utils import Cluster

from raytrain.stages.batch_profiles import find_profiles
from raytrain.stages.devices import find_devices
from raytrain.stages.pipeline import run_pipeline
from raytrain.cluster.session import ray_session
from raytrain.run_folder.workspace import Workspace
from raytrain.config import ClusterSection, check_config
from raytrain.console import Console
from raytrain.training.memory.meter import Probe

values, kinds, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = {cluster.head_node.node_id: "head"}
here = lambda: nodes[ray.get_runtime_context().get_node_id()]
node = cluster.add_node(num_cpus=1, resources={"cpu_host": 1}, labels={"role": "data"})
nodes[node.node_id] = "data"
for kind in kinds:
    special = {f"accelerator_type:{kind}": 1, "gpu_host": 1}
    emulated = {"RAYTRAIN_EMULATED_GPU": f"fake {kind}:{kinds[kind] << 30}"}
    node = cluster.add_node(
        num_cpus=1, num_gpus=1, resources=special, labels={"role": "train"}, env_vars=emulated
    )
    nodes[node.node_id] = kind


def meter(job, group):
    class Meter:
        seconds, num_starts = {}, 1

        def start(self):
            pass

        close = kill = start

        def measure(self, batch_size, edges, num_steps, *, fresh=True):
            with open(f"{out}.{'trial' if fresh else 'soak'}", "a") as file:
                print(job.budget_bytes >> 30, here(), file=file)
            fits = batch_size * edges[0] <= job.budget_bytes >> 20
            return Probe(batch_size, fits, None, 1.0, "out of memory")

    return Meter()


def where():
    "Names of tasks by the node that each ran on."
    time.sleep(2)  # task events are flushed every second
    tasks = {}
    for event in ray._private.state.state._get_all_task_events():
        node = nodes.get(event.state_updates.node_id.hex())
        if node and event.HasField("task_info"):
            tasks.setdefault(node, set()).add(event.task_info.name)
    return {node: sorted(names) for node, names in tasks.items()}


try:
    with ray_session(ClusterSection(address=cluster.address)):
        config = check_config(values)
        run_pipeline(config, Console(quiet=True), ("statistics", "buckets", "assign"))
        workspace, profiles = Workspace(config, config.run_dir), []
        for device in find_devices(config):
            made, _ = find_profiles(
                workspace, device, workspace.path("batch_probes.json"), lambda *what: None, meter
            )
            profiles += [profile.to_body() for profile in made]
        values["train"]["device"] = "cpu"
        values["oomptimize"] = {"device_memory": "64MiB", "max_batch_size": 8}
        values["cluster"]["accelerator_type"] = "T4"
        rest = ("oomptimize", "train", "evaluate", "report")
        ran = run_pipeline(check_config(values), Console(quiet=True), rest)
        where = where()
    json.dump({"profiles": profiles, "where": where, "ran": ran}, open(out, "w"))
finally:
    cluster.shutdown()
"""


@pytest.mark.timeout(300)
def test_every_stage_runs_on_the_nodes_that_are_for_it(corpus, tmp_path):
    values = tiny_values(
        corpus,
        tmp_path,
        train={"num_workers": 1},
        tracking={"enabled": False},
        buckets={"num_token_buckets": 1},
        oomptimize={"device_memory": None, "memory_fraction": 1.0, "max_batch_size": 100_000, "soak_steps": 4},
        cluster={
            "train_labels": {"role": "train"},
            "train_resources": {"gpu_host": 0.5},
            "data_labels": {"role": "in(data, spare)"},
            "data_resources": {"cpu_host": 0.01},
        },
    )
    values["data"]["workers"] = "ray"
    out = tmp_path / "out.json"
    command = [sys.executable, "-c", CLUSTER, json.dumps(values), json.dumps(KINDS), str(out)]
    environment = {**os.environ, "RAY_TRAIN_V2_ENABLED": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-5000:]
    outcome = json.loads(out.read_bytes())
    assert outcome["ran"] == ["oomptimize", "train", "evaluate", "report"]

    def ran_on(name: str) -> set[str]:
        return {node for node, tasks in outcome["where"].items() if name in tasks}

    # Counting, assigning and tracing are `work`; then training's audio, evaluation's audio, evaluation's model.
    for name in ("work", "decode", "read"):
        assert ran_on(f"MapBatches({name})") == {"data"}
    assert ran_on("MapWorker(MapBatches(RecognizerActor)).submit") == {"data"}
    assert ran_on("ProbeCoordinator.tell") == {"data"}
    assert ran_on("ImplicitFunc.train") == set(KINDS)
    assert ran_on("RayTrainWorker.run_train_fn") == {"T4"}
    # Each kind of GPU has its own profile, by probes on its own node.
    assert {profile["setting"]["device_name"]: profile["setting"]["device_gib"] for profile in outcome["profiles"]} == {
        f"fake {kind}": gib for kind, gib in KINDS.items()
    }
    a100, t4 = outcome["profiles"]
    assert all(a100_size > t4_size for a100_size, t4_size in zip(a100["batch_sizes"], t4["batch_sizes"], strict=True))
    for work in ("trial", "soak"):
        lines = {line for line in (tmp_path / f"out.json.{work}").read_text().splitlines()}
        assert lines == {f"{gib} {kind}" for kind, gib in KINDS.items()}


# --- without Ray


def node(name: str, cpus: float = 1, labels: dict | None = None, **resources: float) -> dict:
    has = {"CPU": cpus, "memory": 2**30, **resources}
    return {"NodeID": name, "Alive": True, "Resources": has, "Labels": {"ray.io/node-id": name, **(labels or {})}}


@pytest.fixture
def up(monkeypatch):
    """Sets which nodes are up."""
    return lambda *nodes: monkeypatch.setattr(placement, "alive", lambda: list(nodes))


def test_labels_select_as_ray_says():
    assert selects("train", "train") and not selects("train", "data") and not selects("train", None)
    assert selects("in(a100, h100)", "h100") and not selects("in(a100,h100)", None)
    assert selects("!train", None) and selects("!in(a, b)", "c") and not selects("!in(a, b)", "b")


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"train_labels": {"role": "in(a"}}, "train_labels: label role must be value, !value, in"),
        ({"data_labels": {"ro le": "a"}}, "data_labels: label 'ro le' is not a valid name"),
        ({"data_labels": {"role": True}}, "data_labels.role: input should be a valid string"),
        ({"train_label": {"role": "a"}}, "train_label: unknown key; did you mean train_labels"),
        ({"train_resources": {"GPU": 1}}, "train_resources: resource GPU is built into Ray"),
        ({"data_resources": {"CPU": 1}}, "data_resources: resource CPU is built into Ray"),
        ({"train_resources": {"accelerator_type:A100": 1}}, "set accelerator_type: A100"),
        ({"data_resources": {"cpu_host": 0}}, "cpu_host must be at least 0.0001, got 0"),
        ({"accelerator_type": "A 100"}, "accelerator_type: string should match"),
    ],
)
def test_settings_are_checked(corpus, tmp_path, section, problem):
    with pytest.raises(ConfigError) as raised:
        check_config(tiny_values(corpus, tmp_path, cluster=section))
    assert problem in str(raised.value)


def test_options_say_no_more_than_the_settings():
    assert Placement.data(ClusterSection()).remote_options() == {"num_cpus": 1, "num_gpus": 0}
    cluster = ClusterSection(
        train_labels={"role": "train"}, train_resources={"gpu_host": 1, "CPU": 8}, accelerator_type="A100"
    )
    train = Placement.train(cluster)
    assert train.remote_options(gpus=1) == {
        "num_cpus": 1,
        "num_gpus": 1,
        "resources": {"gpu_host": 1},
        "label_selector": {"role": "train"},
        "accelerator_type": "A100",
    }
    assert train.scaling(gpus=1) == {
        "use_gpu": True,
        "resources_per_worker": {"CPU": 8, "GPU": 1, "gpu_host": 1},
        "label_selector": {"role": "train"},
        "accelerator_type": "A100",
    }
    asked = train.trial_resources(gpus=1)
    assert asked.bundles == [{"CPU": 1, "GPU": 1, "gpu_host": 1, "accelerator_type:A100": 0.001}]
    assert asked._kwargs == {"bundle_label_selector": [{"role": "train"}]}
    assert Placement().trial_resources().bundles == [{"CPU": 1}]


def test_settings_that_no_node_has_are_an_error_that_lists_nodes(up):
    up(node("a", labels={"role": "data"}), node("b", gpu_host=1, **{"accelerator_type:T4": 1}))
    cluster = ClusterSection(data_labels={"role": "date"}, accelerator_type="A100")
    with pytest.raises(ConfigError, match=r"for data; got a node with gpu_host, T4, .*role=data; allowed: data_labels"):
        Placement.data(cluster).nodes()
    with pytest.raises(ConfigError, match="for train; .* allowed: accelerator_type A100; to do: start nodes"):
        Placement.train(cluster).nodes()
    assert len(Placement.data(ClusterSection()).nodes()) == 2


def test_cpus_for_decoding_are_those_of_the_nodes_for_data(corpus, tmp_path, up):
    def free(world_size: int, **cluster) -> int:
        return free_cpus(check_config(tiny_values(corpus, tmp_path, cluster=cluster)), world_size)

    up(node("a", 8, {"role": "train"}, GPU=2), node("b", 4, {"role": "data"}, cpu_host=3))
    assert free(2) == 10
    assert free(2, data_labels={"role": "data"}) == 4  # training finds room elsewhere
    assert free(10, data_labels={"role": "data"}) == 2
    assert free(2, data_labels={"role": "data"}, train_labels={"role": "train"}, data_resources={"cpu_host": 1}) == 3
    assert free(2, data_labels={"role": "train"}, train_labels={"role": "train"}, train_resources={"CPU": 3}) == 2


def test_a_pool_leaves_each_node_what_reading_needs(up):
    up(node("a", 1, {"role": "data"}), node("b", 1, {"role": "data"}), node("c", 64, {"role": "train"}))
    cluster = ClusterSection(data_labels={"role": "data"}, train_labels={"role": "train"})
    pool = find_pool(2, "auto", None, cluster)
    assert (pool.cuda, pool.reader_cpus, pool.actor_cpus, pool.threads) == (False, 0.5, 0.4, 1)
    # Wherever two of these lie, there is half a CPU left on a node.
    assert 4 * find_pool(4, "cpu", None, cluster).actor_cpus <= 1.0
    up(node("a", 8, cpu_host=1))
    with pytest.raises(ConfigError, match="no room for so many workers; got 1; allowed: at most 0"):
        find_pool(1, "cpu", None, ClusterSection(data_resources={"cpu_host": 1}))


def test_nodes_that_ray_train_would_count_by_mistake(up):
    labeled = {"train_labels": {"role": "train"}}
    up(node("a", 1, {"role": "train"}, gpu_host=1), node("b", 1, {"role": "data"}))
    assert [node["NodeID"] for node in Placement.train(ClusterSection(**labeled)).misled()] == ["b"]
    assert not Placement.train(ClusterSection(**labeled)).misled(gpus=1)
    assert not Placement.train(ClusterSection(**labeled, train_resources={"gpu_host": 1})).misled()
