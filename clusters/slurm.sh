#!/usr/bin/env bash
# A run on a Slurm cluster:
#   sbatch clusters/slurm.sh --config jobs/e5-mistral.yaml --set source=/shared/corpus.jsonl --root /shared/run
# It starts Ray on each node, with a token for this allocation only, and the pipeline on the first node. The root must be on a
# disk that all nodes see, or in an object store. If the time limit ends the run, the same sbatch resumes it.
#SBATCH --job-name=readapt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# For `readapt plan --cluster clusters/slurm.sh`: the kind of GPU, and the memory and price of a node.
#READAPT gpu=H100 memory_gb=1000 network_gbit=10 usd_per_hour=0
set -euo pipefail

: "${SLURM_JOB_ID:?run this with sbatch}"
python="${READAPT_PYTHON:-.venv/bin/python}"
ray="${READAPT_RAY:-$(dirname "$python")/ray}"
port="${READAPT_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

# Not by a pipe: one whose reader is done early ends the writer, and with pipefail this script.
nodes="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
head_node="${nodes%%$'\n'*}"
# The address from which the head reaches the last node is one that the nodes reach: its own name may mean 127.0.1.1.
own_address='import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 9))
    print(probe.getsockname()[0])'
head_ip="$(srun --nodes=1 --ntasks=1 --nodelist="$head_node" "$python" -c "$own_address" "${nodes##*$'\n'}")"

# Ray runs what reaches its ports: a token that only this user can read, gone with the job.
umask 077
RAY_AUTH_TOKEN_PATH="$HOME/.readapt-token-$SLURM_JOB_ID"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
"$python" -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

cpus="${SLURM_CPUS_PER_TASK:-1}"
gpus="${SLURM_GPUS_ON_NODE:-0}"
export SRUN_CPUS_PER_TASK="$cpus" # since Slurm 22.05 srun takes it from here, and no longer what sbatch was given
srun --nodes=1 --ntasks=1 --nodelist="$head_node" --overlap \
  "$ray" start --head --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1 \
  --num-cpus="$cpus" --num-gpus="$gpus" --temp-dir="/tmp/ray-$SLURM_JOB_ID" --block &
others=$((SLURM_JOB_NUM_NODES - 1))
if [ "$others" -gt 0 ]; then
  srun --nodes="$others" --ntasks="$others" --exclude="$head_node" --overlap \
    "$ray" start --address="$head_ip:$port" --num-cpus="$cpus" --num-gpus="$gpus" --block &
fi

for _ in $(seq 60); do
  if "$ray" status --address="$head_ip:$port" > /dev/null 2>&1; then break; fi
  sleep 2
done

export RAY_ADDRESS="$head_ip:$port" READAPT_NUM_NODES="$SLURM_JOB_NUM_NODES"
srun --nodes=1 --ntasks=1 --nodelist="$head_node" --overlap "$python" jobs/pipeline.py "$@"
