"""What is right and wrong with a cluster, judged from plain facts about its nodes; nothing is measured here.

    check_open_files(NodeFacts(host="gpu-1", open_files=(1024, 524288)))
    # [Check("open files", "warn", "gpu-1", "1024 of at most 524288", "run `ulimit -n 65536` …")]

`raytrain.cluster.node_facts` measures, `raytrain.operations.doctor` asks every node. Sizes are bytes, speeds MiB/s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
GIB = 1 << 30
MIN_SHM = 2 * GIB
MIN_OPEN_FILES = 65_536
MIN_FREE = 20 * GIB
FULL_SHARE = 0.95  # Ray refuses to spill objects to a disk that is fuller
CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 300.0
SLOW_MIB_S = 30.0
# Objects that cross nodes belong to these; the others may differ where no stage notices.
_MUST_MATCH = ("python", "ray", "torch", "raytrain")
_RISK = "whoever reaches it runs code as its user (CVE-2023-48022)"
_TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token, and one token in RAY_AUTH_TOKEN or ~/.ray/auth_token (`ray get-auth-token --generate`), "
    "on every node and for every client, and start Ray again"
)


@dataclass(frozen=True)
class Check:
    """One finding: `where` is a host, or "" for the cluster as a whole; `remedy` is empty where nothing is wrong."""

    name: str
    status: str
    where: str
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """What one node said. `error` is set where it could not say anything; then the other fields are empty.

    `open_files` are the soft and the hard limit; `clock_s` is how far the node's clock is ahead of the driver's;
    `memory_monitor` is the raylet's RAY_memory_monitor_refresh_ms, None where it is not set; `jobs_api` is what the
    Jobs API answers without a token, `url` and `status` (None: it does not answer), None where it was not asked.
    """

    host: str = ""
    address: str = ""
    is_head: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    cpus: float = 0
    memory: int = 0
    gpus: tuple[dict[str, Any], ...] = ()
    ray_gpus: float = 0
    installed_gpus: int = 0
    gpu_driver: str = ""
    gpu_error: str = ""
    shm_total: int = 0
    shm_free: int = 0
    object_store: int = 0
    open_files: tuple[int, int] = (0, 0)
    clock_s: float = 0.0
    temp_folder: dict[str, Any] = field(default_factory=dict)
    cache_folder: dict[str, Any] = field(default_factory=dict)
    decoders: dict[str, Any] = field(default_factory=dict)
    auth_mode: str = ""
    memory_monitor: str | None = None
    jobs_api: dict[str, Any] | None = None
    storage: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> NodeFacts:
        """From what a node sent, which may have another version's fields."""
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def check_answer(node: NodeFacts) -> list[Check]:
    """A node that could not be asked."""
    if not node.error:
        return []
    remedy = "look into Ray's logs on the node, <temp folder>/session_latest/logs"
    if "No module named" in node.error:
        remedy = "install raytrain on the node, with the lock file of the driver's"
    return [Check("node", FAIL, node.host, node.error, remedy)]


def check_connection(why: str) -> Check:
    """A Ray that did not let the driver in, for the reason that it gave."""
    lower = why.lower()
    if "mismatch" in lower or "version" in lower:
        remedy = "use the same Python (x.y.z) and Ray here and on the cluster"
    elif any(word in lower for word in ("auth", "token", "failed to connect")):
        # Ray only says that it failed to connect where the token is missing or wrong.
        remedy = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    else:
        remedy = "start Ray (`ray start --head`), give its address as HOST:6379, open its ports to this machine"
    return Check("Ray", FAIL, "", why, remedy)


def check_nodes(alive: int, least: int) -> list[Check]:
    """Whether all nodes that are waited for have come."""
    if alive >= least:
        return [Check("Ray", OK, "", f"{alive} node{'s' if alive > 1 else ''} alive")]
    remedy = "look at what `ray start` said on the missing ones: address, ports, token, versions"
    return [Check("Ray", FAIL, "", f"{alive} of {least} nodes alive", remedy)]


def check_versions(nodes: Sequence[NodeFacts], driver: dict[str, str]) -> list[Check]:
    """Packages that differ between a node and the driver. A build's suffix (`+cpu`, `+cu130`) may differ."""
    found = []
    for node in nodes:
        here = node.versions
        # The same files are the same version, also where they came with the job and nothing is installed.
        names = [name for name in driver if name != "raytrain" or here.get("code") != driver.get("code")]
        different = [name for name in names if _public(here.get(name)) != _public(driver[name])]
        serious = any(name in _MUST_MATCH for name in different)
        seen = ", ".join(f"{name} {here.get(name, 'missing')}, the driver has {driver[name]}" for name in different)
        if different:
            remedy = "install the same lock file on every node, or start every node from the same image"
            found.append(Check("versions", FAIL if serious else WARN, node.host, seen, remedy))
        else:
            shown = [f"{name} {driver[name]}" for name in _MUST_MATCH if name in driver]
            found.append(Check("versions", OK, node.host, ", ".join(shown)))
    return found


def _public(version: str | None) -> str | None:
    return version and version.partition("+")[0]


def check_gpus(node: NodeFacts) -> list[Check]:
    """What torch can use beside what is built in and what Ray hands out."""
    here, known = len(node.gpus), int(node.ray_gpus)
    names = [f"{one['name']}, {one['memory'] / GIB:.0f} GiB, sm_{one['capability']}" for one in node.gpus]
    seen = "; ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    if node.gpu_driver:
        seen += f"{'; ' if seen else ''}driver {node.gpu_driver}"
    if node.gpu_error:
        remedy = "compare the driver that nvidia-smi names with the CUDA of this torch (`torch.version.cuda`)"
        return [Check("GPUs", FAIL, node.host, f"torch can't use them: {node.gpu_error}", remedy)]
    if node.installed_gpus and not here:
        remedy = "install a torch with CUDA, look at CUDA_VISIBLE_DEVICES, start the container with its GPUs"
        return [Check("GPUs", FAIL, node.host, f"{node.installed_gpus} built in, torch sees none", remedy)]
    if known > here:
        remedy = "start Ray without --num-gpus, or with the number that there are"
        counted = f"Ray hands out {known}, torch sees {here}; {seen}".rstrip("; ")
        return [Check("GPUs", FAIL, node.host, counted, remedy)]
    if known < here:
        remedy = "start Ray where it sees all GPUs, without --num-gpus or CUDA_VISIBLE_DEVICES"
        return [Check("GPUs", WARN, node.host, f"torch sees {here}, Ray hands out {known}; {seen}", remedy)]
    return [Check("GPUs", OK, node.host, seen or "none")]


def check_shared_memory(node: NodeFacts) -> list[Check]:
    """/dev/shm holds Ray's objects and NCCL's buffers."""
    seen = f"/dev/shm has {node.shm_total / GIB:.1f} GiB, {node.shm_free / GIB:.1f} free; "
    seen += f"Ray's object store {node.object_store / GIB:.1f}"
    remedy = "docker run --shm-size, an emptyDir with medium Memory in Kubernetes, or a smaller --object-store-memory"
    if node.shm_total < node.object_store:
        return [Check("shared memory", FAIL, node.host, seen + ", of which part is then on disk", remedy)]
    if node.shm_total < MIN_SHM:
        return [Check("shared memory", FAIL, node.host, seen, remedy)]
    return [Check("shared memory", OK, node.host, seen)]


def check_open_files(node: NodeFacts) -> list[Check]:
    """Ray's processes and readers of many shards keep thousands of files and sockets open."""
    soft, hard = node.open_files
    seen = f"{soft} of at most {hard}"
    if soft >= MIN_OPEN_FILES:
        return [Check("open files", OK, node.host, f"{soft}")]
    if hard >= MIN_OPEN_FILES:
        remedy = f"run `ulimit -n {MIN_OPEN_FILES}` before `ray start`"
    else:
        remedy = (
            f"raise the hard limit to {MIN_OPEN_FILES}: limits.conf or systemd's LimitNOFILE, docker run --ulimit "
            f"nofile={MIN_OPEN_FILES}"
        )
    return [Check("open files", FAIL if soft < 1024 else WARN, node.host, seen, remedy)]


def check_clock(node: NodeFacts) -> list[Check]:
    """Signed requests to object stores fail with a wrong clock, and logs can't be put beside each other."""
    seen = f"{abs(node.clock_s):.1f} s {'ahead of' if node.clock_s > 0 else 'behind'} the driver's"
    if abs(node.clock_s) < CLOCK_WARN_S:
        return [Check("clock", OK, node.host, seen)]
    status = FAIL if abs(node.clock_s) >= CLOCK_FAIL_S else WARN
    return [Check("clock", status, node.host, seen, "let chrony or systemd-timesyncd set it")]


def check_disks(node: NodeFacts) -> list[Check]:
    """Free space for Ray's temporary files and spilled objects, and for the cache."""
    found = []
    for name, folder, remedy in (
        ("temp folder", node.temp_folder, "free some, or start Ray with --temp-dir on a larger disk"),
        ("cache folder", node.cache_folder, "free some, or name a folder on a larger disk in RAYTRAIN_CACHE"),
    ):
        if not folder:
            continue
        free, total = folder["free"], max(folder["total"], 1)
        seen = f"{folder['path']}: {free / GIB:.0f} of {total / GIB:.0f} GiB free"
        if not folder["writable"]:
            found.append(Check(name, FAIL, node.host, f"{folder['path']} can't be written", remedy))
        elif 1 - free / total > FULL_SHARE:
            found.append(Check(name, FAIL, node.host, seen, remedy))
        else:
            found.append(Check(name, *((WARN, node.host, seen, remedy) if free < MIN_FREE else (OK, node.host, seen))))
    return found


def check_decoders(node: NodeFacts) -> list[Check]:
    """Formats that the node can read."""
    missing, error = node.decoders.get("missing", []), node.decoders.get("error", "")
    remedy = "install soundfile's own libsndfile (pip's wheel brings one), or the distribution's libsndfile1"
    if error:
        return [Check("audio decoders", FAIL, node.host, error, remedy)]
    seen = node.decoders.get("library", "")
    if missing:
        status = FAIL if set(missing) & {"WAV", "FLAC"} else WARN
        return [Check("audio decoders", status, node.host, f"{seen} can't read {', '.join(missing)}", remedy)]
    return [Check("audio decoders", OK, node.host, seen)]


def check_memory_monitor(node: NodeFacts) -> list[Check]:
    """Ray's own killer of workers, which Ray Train and Tune do not survive."""
    if node.memory_monitor == "0":
        return [Check("memory monitor", OK, node.host, "off")]
    remedy = "set RAY_memory_monitor_refresh_ms=0 in the environment of `ray start`"
    return [Check("memory monitor", WARN, node.host, "on: a worker that it kills ends Ray Train and Tune", remedy)]


def check_authentication(nodes: Sequence[NodeFacts], driver_mode: str, has_token: bool) -> list[Check]:
    """Whether Ray asks for a token, and the Jobs API does."""
    found = []
    off = [node.host for node in nodes if node.auth_mode != "token"]
    if driver_mode != "token":
        off.append("the driver")
    if off:
        found.append(Check("authentication", FAIL, "", f"off on {', '.join(off)}: {_RISK}", _TOKEN_REMEDY))
    elif not has_token:
        found.append(Check("authentication", FAIL, "", "on, but the driver has no token", _TOKEN_REMEDY))
    else:
        found.append(Check("authentication", OK, "", "by token"))
    for node in nodes:
        if node.jobs_api is None:
            continue
        url, status = node.jobs_api["url"], node.jobs_api["status"]
        if status is None:
            found.append(Check("Jobs API", OK, "", f"{url} does not answer"))
        elif status in (401, 403):
            found.append(Check("Jobs API", OK, "", f"{url} asks for the token"))
        else:
            seen = f"{url} answers without a token ({status}): {_RISK}"
            found.append(Check("Jobs API", FAIL, "", seen, _TOKEN_REMEDY))
    return found


def check_room(workers: int, room: int, each: str) -> list[Check]:
    """Whether `workers` of training fit into the `room` that its nodes have; `each` says what a worker takes."""
    if room >= workers:
        return [Check("room", OK, "", f"the {workers} workers of training fit ({each} each)")]
    remedy = "add nodes, or lower train.num_workers; with autoscaling, nodes come when they are asked for"
    return [Check("room", WARN, "", f"{room} of the {workers} workers of training fit ({each} each)", remedy)]


def check_owner(location: str, described: tuple[str, bool] | None) -> list[Check]:
    """Whether a command may write to the run folder; `described` is what `describe_owner` says of it."""
    if described is None:
        return [Check("owner", OK, "", f"nobody owns {location}")]
    text, may_live = described
    remedy = "wait until it has ended, stop it, or take the folder from it with --take-over"
    return [Check("owner", WARN, "", text, remedy) if may_live else Check("owner", OK, "", text)]


def check_storage(nodes: Sequence[NodeFacts], root: str, shared: bool) -> list[Check]:
    """Speed at `run.root` from each node, and whether they all see the same folder there. `shared` says that it has to
    be: it is a local path and there are several nodes."""
    found = []
    for node in nodes:
        facts = node.storage
        if facts.get("error"):
            remedy = "look at the path, its permissions, and for object stores at AWS_… or the like on that node"
            found.append(Check("run.root", FAIL, node.host, f"{root}: {facts['error']}", remedy))
            continue
        if shared and not facts.get("sees_driver"):
            seen = f"nodes do not share run.root: {root} is not the driver's folder there"
            remedy = "put run.root on a disk that all nodes mount at the same path, or in an object store (s3://…)"
            found.append(Check("run.root", FAIL, node.host, seen, remedy))
            continue
        write, read = facts["write_mib_s"], facts["read_mib_s"]
        seen = f"{root}: written at {write:,.0f} MiB/s, read at {read:,.0f}"
        if min(write, read) < SLOW_MIB_S:
            remedy = "checkpoints and the report wait for it: use faster storage, or one in the same region"
            found.append(Check("run.root", WARN, node.host, seen, remedy))
        else:
            found.append(Check("run.root", OK, node.host, seen))
    return found


def check_manifests(nodes: Sequence[NodeFacts]) -> list[Check]:
    """The first manifest of each corpus, read on each node."""
    found = []
    for node in nodes:
        answers = node.storage.get("manifests", [])
        bad = [f"{one['corpus']}: {one['error']}" for one in answers if one["error"]]
        if bad:
            remedy = "mount data.root at the same path on every node, or put it in an object store (s3://…)"
            found.append(Check("manifests", FAIL, node.host, "; ".join(bad), remedy))
        elif answers:
            found.append(Check("manifests", OK, node.host, f"{len(answers)} corpora readable"))
    return found


def check_mlflow(nodes: Sequence[NodeFacts], uri: str, driver: dict[str, Any] | None) -> list[Check]:
    """MLflow as the driver and the nodes reach it. `driver` is None where tracking is off."""
    if driver is None:
        return []
    answers = {"the driver": driver} | {node.host: node.storage.get("mlflow") for node in nodes}
    bad = {where: one["error"] for where, one in answers.items() if one and one["error"]}
    if bad:
        remedy = "start the server, open its port to this machine, look at tracking.uri and MLFLOW_TRACKING_…"
        return [Check("MLflow", FAIL, where, f"{uri}: {error}", remedy) for where, error in bad.items()]
    if uri.startswith("sqlite:") and len(nodes) > 1:
        remedy = "start `mlflow server` and set tracking.uri to its address"
        return [Check("MLflow", WARN, "", f"{uri} is a file, and there are {len(nodes)} nodes", remedy)]
    return [Check("MLflow", OK, "", f"{uri}: {driver['seen']}")]


def fold(checks: Iterable[Check]) -> list[Check]:
    """Equal findings of several nodes as one, `where` naming them; what is worst comes first."""
    hosts: dict[Check, list[str]] = {}
    for check in checks:
        hosts.setdefault(replace(check, where=""), []).append(check.where)
    folded = [replace(check, where=_places(found)) for check, found in hosts.items()]
    return sorted(folded, key=lambda check: (FAIL, WARN, OK).index(check.status))


def _places(hosts: list[str]) -> str:
    return ", ".join(hosts) if len(hosts) <= 3 else f"{hosts[0]} and {len(hosts) - 1} more"
