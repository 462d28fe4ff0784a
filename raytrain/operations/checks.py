"""Checks of a cluster, based on plain facts about its nodes; nothing is measured here.

    check_open_files(NodeFacts(host="gpu-1", open_files=(1024, 524288)))
    # [Check("open files", "warn", "gpu-1", "1024 of at most 524288", "run `ulimit -n 65536` …")]

`machine` and `run_storage` measure; `doctor` queries every node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from raytrain.operations.facts import GIB, Folder, JobsApi, Mlflow, NodeFacts, Storage

OK, WARN, FAIL = "ok", "warn", "fail"
MIN_SHM = 2 * GIB
MIN_OPEN_FILES = 65_536
MIN_FREE = 20 * GIB
FULL_SHARE = 0.95  # Ray refuses to spill objects to a disk that is fuller than this
CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 300.0
SLOW_MIB_S = 30.0
# Objects of these packages travel between nodes; other packages may differ without any stage noticing.
_MUST_MATCH = ("python", "ray", "torch", "raytrain")
_RISK = "anyone who can reach it can run code as its user (CVE-2023-48022)"
_TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token, and one token in RAY_AUTH_TOKEN or ~/.ray/auth_token (`ray get-auth-token --generate`), "
    "on every node and client, and restart Ray"
)


@dataclass(frozen=True)
class Check:
    """One finding: `where` is a host, or "" for the cluster as a whole; `remedy` is empty if nothing is wrong."""

    name: str
    status: str
    where: str
    seen: str
    remedy: str = ""


def check_answer(node: NodeFacts) -> list[Check]:
    """A node that could not be queried."""
    if not node.error:
        return []
    remedy = "read Ray's logs on the node, <temp folder>/session_latest/logs"
    if "No module named" in node.error:
        remedy = "install raytrain on the node, with the driver's lock file"
    return [Check("node", FAIL, node.host, node.error, remedy)]


def check_connection(why: str) -> Check:
    """A Ray that refused the driver, with a remedy for the reason it gave."""
    lower = why.lower()
    if "mismatch" in lower or "version" in lower:
        remedy = "use the same Python (x.y.z) and Ray here and on the cluster"
    elif any(word in lower for word in ("auth", "token", "failed to connect")):
        # If the token is missing or wrong, Ray only says that it failed to connect.
        remedy = "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
    else:
        remedy = "start Ray (`ray start --head`), give its address as HOST:6379, open its ports to this machine"
    return Check("Ray", FAIL, "", why, remedy)


def check_nodes(alive: int, least: int) -> list[Check]:
    """Whether all expected nodes are up."""
    if alive >= least:
        return [Check("Ray", OK, "", f"{alive} node{'s' if alive > 1 else ''} alive")]
    remedy = "read what `ray start` printed on the missing nodes: address, ports, token, versions"
    return [Check("Ray", FAIL, "", f"{alive} of {least} nodes alive", remedy)]


def check_versions(nodes: Sequence[NodeFacts], driver: dict[str, str]) -> list[Check]:
    """Packages that differ between a node and the driver. A build's suffix (`+cpu`, `+cu130`) may differ."""
    return [_check_versions(node, driver) for node in nodes]


def _check_versions(node: NodeFacts, driver: dict[str, str]) -> Check:
    here = node.versions
    # Equal files mean the same version, even if they came with the job and nothing is installed.
    names = [name for name in driver if name != "raytrain" or here.get("code") != driver.get("code")]
    different = [name for name in names if _public(here.get(name)) != _public(driver[name])]
    if not different:
        shown = [f"{name} {driver[name]}" for name in _MUST_MATCH if name in driver]
        return Check("versions", OK, node.host, ", ".join(shown))
    status = FAIL if any(name in _MUST_MATCH for name in different) else WARN
    seen = ", ".join(f"{name} {here.get(name, 'missing')}, the driver has {driver[name]}" for name in different)
    remedy = "install the same lock file on every node, or start every node from the same image"
    return Check("versions", status, node.host, seen, remedy)


def _public(version: str | None) -> str | None:
    return version and version.partition("+")[0]


def check_gpus(node: NodeFacts) -> list[Check]:
    """The GPUs that torch can use, compared with those installed and those that Ray offers."""
    usable, handed_out = len(node.gpus), int(node.ray_gpus)
    seen = _described_gpus(node)
    if node.gpu_error:
        remedy = "compare the driver version in nvidia-smi with torch's CUDA version (`torch.version.cuda`)"
        return [Check("GPUs", FAIL, node.host, f"torch can't use them: {node.gpu_error}", remedy)]
    if node.installed_gpus and not usable:
        remedy = "install a torch with CUDA, check CUDA_VISIBLE_DEVICES, start the container with its GPUs"
        return [Check("GPUs", FAIL, node.host, f"{node.installed_gpus} installed, torch sees none", remedy)]
    if handed_out > usable:
        remedy = "start Ray without --num-gpus, or with the actual number"
        counted = f"Ray offers {handed_out}, torch sees {usable}; {seen}".rstrip("; ")
        return [Check("GPUs", FAIL, node.host, counted, remedy)]
    if handed_out < usable:
        remedy = "start Ray where it sees all GPUs, without --num-gpus or CUDA_VISIBLE_DEVICES"
        return [Check("GPUs", WARN, node.host, f"torch sees {usable}, Ray offers {handed_out}; {seen}", remedy)]
    return [Check("GPUs", OK, node.host, seen or "none")]


def _described_gpus(node: NodeFacts) -> str:
    names = [f"{gpu.name}, {gpu.memory / GIB:.0f} GiB, sm_{gpu.capability}" for gpu in node.gpus]
    kinds = [f"{names.count(name)} × {name}" for name in dict.fromkeys(names)]
    driver = [f"driver {node.gpu_driver}"] if node.gpu_driver else []
    return "; ".join(kinds + driver)


def check_shared_memory(node: NodeFacts) -> list[Check]:
    """/dev/shm holds Ray's objects and NCCL's buffers."""
    seen = f"/dev/shm has {node.shm_total / GIB:.1f} GiB, {node.shm_free / GIB:.1f} free; "
    seen += f"Ray's object store {node.object_store / GIB:.1f}"
    remedy = "docker run --shm-size, an emptyDir with medium Memory in Kubernetes, or a smaller --object-store-memory"
    if node.shm_total < node.object_store:
        return [Check("shared memory", FAIL, node.host, seen + ", so part of it is on disk", remedy)]
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
    """With a wrong clock, signed requests to object stores fail and logs can't be compared."""
    seen = f"{abs(node.clock_s):.1f} s {'ahead of' if node.clock_s > 0 else 'behind'} the driver's"
    if abs(node.clock_s) < CLOCK_WARN_S:
        return [Check("clock", OK, node.host, seen)]
    status = FAIL if abs(node.clock_s) >= CLOCK_FAIL_S else WARN
    return [Check("clock", status, node.host, seen, "synchronize it with chrony or systemd-timesyncd")]


def check_disks(node: NodeFacts) -> list[Check]:
    """Free space for Ray's temporary files and spilled objects, and for the cache."""
    named = (
        ("temp folder", node.temp_folder, "free space, or start Ray with --temp-dir on a larger disk"),
        ("cache folder", node.cache_folder, "free space, or set RAYTRAIN_CACHE to a folder on a larger disk"),
    )
    return [_check_disk(name, folder, node.host, remedy) for name, folder, remedy in named if folder is not None]


def _check_disk(name: str, folder: Folder, host: str, remedy: str) -> Check:
    total = max(folder.total, 1)
    seen = f"{folder.path}: {folder.free / GIB:.0f} of {total / GIB:.0f} GiB free"
    if not folder.writable:
        return Check(name, FAIL, host, f"{folder.path} can't be written", remedy)
    if 1 - folder.free / total > FULL_SHARE:
        return Check(name, FAIL, host, seen, remedy)
    return Check(name, WARN, host, seen, remedy) if folder.free < MIN_FREE else Check(name, OK, host, seen)


def check_decoders(node: NodeFacts) -> list[Check]:
    """The audio formats that the node can read."""
    decoders = node.decoders
    if decoders is None:
        return []
    remedy = "install soundfile's bundled libsndfile (in its pip wheel), or the distribution's libsndfile1"
    if decoders.error:
        return [Check("audio decoders", FAIL, node.host, decoders.error, remedy)]
    if decoders.missing:
        status = FAIL if set(decoders.missing) & {"WAV", "FLAC"} else WARN
        seen = f"{decoders.library} can't read {', '.join(decoders.missing)}"
        return [Check("audio decoders", status, node.host, seen, remedy)]
    return [Check("audio decoders", OK, node.host, decoders.library)]


def check_memory_monitor(node: NodeFacts) -> list[Check]:
    """Ray's memory monitor, whose killing of workers Ray Train and Tune do not survive."""
    if node.memory_monitor == "0":
        return [Check("memory monitor", OK, node.host, "off")]
    remedy = "set RAY_memory_monitor_refresh_ms=0 in the environment of `ray start`"
    return [Check("memory monitor", WARN, node.host, "on: a worker that it kills ends Ray Train and Tune", remedy)]


def check_authentication(nodes: Sequence[NodeFacts], driver_mode: str, has_token: bool) -> list[Check]:
    """Whether Ray and the Jobs API require a token."""
    hosts = [node.host for node in nodes if node.auth_mode != "token"]
    if driver_mode != "token":
        hosts.append("the driver")
    if hosts:
        check = Check("authentication", FAIL, "", f"off on {', '.join(hosts)}: {_RISK}", _TOKEN_REMEDY)
    elif not has_token:
        check = Check("authentication", FAIL, "", "on, but the driver has no token", _TOKEN_REMEDY)
    else:
        check = Check("authentication", OK, "", "by token")
    return [check, *(_check_jobs_api(node.jobs_api) for node in nodes if node.jobs_api is not None)]


def _check_jobs_api(api: JobsApi) -> Check:
    if api.status is None:
        return Check("Jobs API", OK, "", f"{api.url} does not answer")
    if api.status in (401, 403):
        return Check("Jobs API", OK, "", f"{api.url} requires the token")
    return Check("Jobs API", FAIL, "", f"{api.url} answers without a token ({api.status}): {_RISK}", _TOKEN_REMEDY)


def check_room(workers: int, room: int, each: str) -> list[Check]:
    """Whether `workers` training workers fit in the `room` on their nodes; `each` says what a worker takes."""
    if room >= workers:
        return [Check("room", OK, "", f"all {workers} training workers fit ({each} each)")]
    remedy = "add nodes, or lower train.num_workers; with autoscaling, nodes are added on demand"
    return [Check("room", WARN, "", f"{room} of {workers} training workers fit ({each} each)", remedy)]


def check_owner(location: str, described: tuple[str, bool] | None) -> list[Check]:
    """Whether a command may write to the run folder; `described` is the result of `describe_owner`."""
    if described is None:
        return [Check("owner", OK, "", f"nobody owns {location}")]
    text, may_live = described
    remedy = "wait for it to end, stop it, or take over the folder with --take-over"
    return [Check("owner", WARN, "", text, remedy) if may_live else Check("owner", OK, "", text)]


def check_storage(nodes: Sequence[NodeFacts], root: str, shared: bool) -> list[Check]:
    """Speed at `run.root` from each node, and whether they all see the same folder there. `shared` says that they must:
    it is a local path and there are several nodes."""
    return [_check_storage(node.host, node.storage, root, shared) for node in nodes if node.storage is not None]


def _check_storage(host: str, storage: Storage, root: str, shared: bool) -> Check:
    if storage.problem:
        remedy = "check the path, its permissions, and for object stores AWS_… or similar variables on that node"
        return Check("run.root", FAIL, host, f"{root}: {storage.problem}", remedy)
    if storage.speed is None or (shared and not storage.sees_driver):
        seen = f"nodes do not share run.root: {root} is a different folder there than on the driver"
        remedy = "put run.root on a disk that all nodes mount at the same path, or in an object store (s3://…)"
        return Check("run.root", FAIL, host, seen, remedy)
    write, read = storage.speed.write_mib_s, storage.speed.read_mib_s
    seen = f"{root}: written at {write:,.0f} MiB/s, read at {read:,.0f}"
    if min(write, read) < SLOW_MIB_S:
        remedy = "checkpoints and the report depend on its speed: use faster storage, or a bucket in the same region"
        return Check("run.root", WARN, host, seen, remedy)
    return Check("run.root", OK, host, seen)


def check_manifests(nodes: Sequence[NodeFacts]) -> list[Check]:
    """The first manifest of each corpus, read on each node."""
    checks = []
    for node in nodes:
        manifests = node.storage.manifests if node.storage else ()
        unreadable = [f"{manifest.corpus}: {manifest.error}" for manifest in manifests if manifest.error]
        if unreadable:
            remedy = "mount data.root at the same path on every node, or put it in an object store (s3://…)"
            checks.append(Check("manifests", FAIL, node.host, "; ".join(unreadable), remedy))
        elif manifests:
            checks.append(Check("manifests", OK, node.host, f"{len(manifests)} corpora readable"))
    return checks


def check_mlflow(nodes: Sequence[NodeFacts], uri: str, driver: Mlflow | None) -> list[Check]:
    """MLflow as reached from the driver and the nodes. `driver` is None if tracking is off."""
    if driver is None:
        return []
    answers = {"the driver": driver} | {node.host: node.storage.mlflow for node in nodes if node.storage}
    errors = {where: answer.error for where, answer in answers.items() if answer and answer.error}
    if errors:
        remedy = "start the server, open its port to this machine, check tracking.uri and MLFLOW_TRACKING_…"
        return [Check("MLflow", FAIL, where, f"{uri}: {error}", remedy) for where, error in errors.items()]
    if uri.startswith("sqlite:") and len(nodes) > 1:
        remedy = "start `mlflow server` and set tracking.uri to its address"
        return [Check("MLflow", WARN, "", f"{uri} is a file, and there are {len(nodes)} nodes", remedy)]
    return [Check("MLflow", OK, "", f"{uri}: {driver.seen}")]


def fold(checks: Iterable[Check]) -> list[Check]:
    """Merge equal findings of several nodes, with their names in `where`; the worst comes first."""
    hosts: dict[Check, list[str]] = {}
    for check in checks:
        hosts.setdefault(replace(check, where=""), []).append(check.where)
    folded = [replace(check, where=_shortened(names)) for check, names in hosts.items()]
    return sorted(folded, key=lambda check: (FAIL, WARN, OK).index(check.status))


def _shortened(hosts: list[str]) -> str:
    return ", ".join(hosts) if len(hosts) <= 3 else f"{hosts[0]} and {len(hosts) - 1} more"
