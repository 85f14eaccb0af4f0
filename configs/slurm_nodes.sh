#!/usr/bin/env bash
# Segment a collection on all GPUs of several nodes, in one allocation: sbatch configs/slurm_nodes.sh pipeline.yaml
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue

set -u
scheduler_file=$PWD/scheduler-$SLURM_JOB_ID.json # on a disk that all nodes see
rm -f "$scheduler_file" # a job that starts again after a node failed keeps its number

# Keys for this allocation only, without which nobody can connect to the scheduler and the workers.
keys=$PWD/.dask-keys-$SLURM_JOB_ID # on the same disk
mkdir -p -m 700 "$keys" || exit
trap 'rm -rf "$keys"' EXIT
python - "$keys" <<'END' || exit
import sys
from pathlib import Path
from distributed.security import Security
for name, text in Security.temporary().get_tls_config_for_role("worker").items():
    if text:
        Path(sys.argv[1], name).write_text(text)
END
export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=True DASK_DISTRIBUTED__COMM__TLS__CA_FILE=$keys/ca_file
for who in CLIENT SCHEDULER WORKER; do
    export "DASK_DISTRIBUTED__COMM__TLS__${who}__CERT=$keys/cert" "DASK_DISTRIBUTED__COMM__TLS__${who}__KEY=$keys/key"
done
# Dask's scheduler keeps the last 1000 messages to each worker; with many workers that is gigabytes.
export DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH=100
dask scheduler --protocol tls --scheduler-file "$scheduler_file" --dashboard-address 127.0.0.1:8787 &
scheduler=$!
# One process for each GPU of a node, pinned to it; four threads, so that it reads and writes while it computes.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # newer versions of srun do not inherit it
# CUDA numbers GPUs as nvidia-smi and dask-cuda do. No memory limit: a paused worker would hang.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
common=(--scheduler-file "$scheduler_file" --nthreads 4 --memory-limit 0 --no-dashboard --death-timeout 300)
srun --overlap dask cuda worker "${common[@]}" &
# Workers on the other cores do the tasks that need no GPU, in half of a node's memory; each takes up to 1.5 GB of it.
left=$((SLURM_CPUS_PER_TASK - ${SLURM_GPUS_ON_NODE:-0}))
memory=${SLURM_MEM_PER_NODE:-0} # in MB
[ "$memory" -gt 0 ] || memory=$((${SLURM_MEM_PER_CPU:-0} * SLURM_CPUS_PER_TASK))
[ "$memory" -gt 0 ] || memory=$(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo)
[ $left -lt $((memory / 3000)) ] || left=$((memory / 3000))
if [ $left -gt 0 ]; then
    srun --overlap env CUDA_VISIBLE_DEVICES= dask worker "${common[@]}" --nworkers $left &
fi
until [ -s "$scheduler_file" ]; do
    kill -0 $scheduler || exit # it could not start
    sleep 1
done

cryosiam-dask run --config-file "$1" --scheduler-file "$scheduler_file" --device cuda &
run=$!
trap 'kill -USR1 $run' USR1 # Slurm's warning: tasks in flight are finished and recorded
wait $run
status=$?
while kill -0 $run 2>/dev/null; do # a trap ends 'wait' before the run has ended
    wait $run
    status=$?
done
rm -f "$scheduler_file"
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID" # the same command resumes
fi
exit "$status"
