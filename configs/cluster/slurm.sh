#!/bin/bash
# A Ray cluster for one Slurm job, and a run on it:
#
#   sbatch --nodes=4 --gpus-per-node=8 configs/cluster/slurm.sh mine.yaml --set train.max_steps=20000
#
# The head starts on the first node, where this script runs, and a worker on each of the other nodes. Nodes may differ:
# each offers Ray the CPUs and GPUs that Slurm allocated. Arguments after the configuration go to `raytrain run`. The
# same command resumes where the last job ended. Ray's logs stay in /tmp/ray-JOB on each node. Variables:
#
#   RAYTRAIN_ENV             a virtual environment that all nodes can read
#   RAYTRAIN_HEAD_IP         the head's address, if the other nodes can't reach its first address
#   RAYTRAIN_SKIP_DOCTOR=1   run without checking the cluster with `raytrain doctor`
#SBATCH --job-name=raytrain
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail
umask 077

if [ $# -lt 1 ]; then
    echo "usage: sbatch slurm.sh CONFIG [--set SECTION.KEY=VALUE …]" >&2
    exit 2
fi
config=$1
shift
if [ -n "${RAYTRAIN_ENV:-}" ]; then
    # shellcheck disable=SC1091
    source "$RAYTRAIN_ENV/bin/activate"
fi

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]}
head_ip=${RAYTRAIN_HEAD_IP:-$(hostname -I | cut -d' ' -f1)}
# Jobs that share a node must not share ports. Ray's workers get any free ports instead of their default range of 10002
# to 19999; from 32768 on, the system assigns ports.
base=$((20000 + SLURM_JOB_ID % 1200 * 10))

# The token lives as long as the job. Steps inherit it; it is never in a file or in a process list.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n')
export RAY_AUTH_TOKEN
export RAY_memory_monitor_refresh_ms=0
export RAY_ADDRESS=$head_ip:$base
export RAYTRAIN_CACHE=${RAYTRAIN_CACHE:-${TMPDIR:-/tmp}/raytrain-$SLURM_JOB_ID}

steps=()
driver=
stop() {
    trap - EXIT TERM
    # Not `ray stop`, which would also end other jobs' Ray processes on the same node.
    if [ ${#steps[@]} -gt 0 ]; then kill -TERM ${driver:+"$driver"} "${steps[@]}" 2>/dev/null || true; fi
    wait || true
}
trap stop EXIT
trap 'exit 143' TERM

# Evaluated on each node: the resources that Slurm gave to the step there.
# shellcheck disable=SC2016
start='ulimit -n "$(ulimit -Hn)"
exec ray start --num-cpus="${SLURM_CPUS_ON_NODE:-1}" --min-worker-port=0 --max-worker-port=0 --disable-usage-stats \
    --block "$@"'
step() {
    local node=$1
    shift
    # No CPU binding: otherwise the task would be pinned to one core.
    srun --nodes=1 --ntasks=1 --nodelist="$node" --overlap --cpu-bind=none bash -c "$start" ray-start "$@" &
    steps+=($!)
}

step "$head_node" --head --node-ip-address="$head_ip" --port="$base" --temp-dir="/tmp/ray-$SLURM_JOB_ID" \
    --dashboard-host=127.0.0.1 --dashboard-port=$((base + 1)) --ray-client-server-port=$((base + 2)) \
    --dashboard-agent-listen-port=$((base + 3))
# Workers give up if no head answers.
for _ in $(seq 120); do
    if (exec 3<>"/dev/tcp/$head_ip/$base") 2>/dev/null; then break; fi
    if ! kill -0 "${steps[0]}" 2>/dev/null; then
        echo "the head did not start" >&2
        exit 1
    fi
    sleep 1
done
for node in "${nodes[@]:1}"; do
    step "$node" --address="$RAY_ADDRESS" --dashboard-agent-listen-port=$((base + 4))
done

# In the background, so that a signal from Slurm is handled at once; training can resume from its newest checkpoint.
if [ -z "${RAYTRAIN_SKIP_DOCTOR:-}" ]; then
    raytrain doctor --nodes "${#nodes[@]}" --config "$config" "$@" &
    driver=$!
    wait "$driver"
fi
raytrain run --config "$config" "$@" &
driver=$!
wait "$driver"
