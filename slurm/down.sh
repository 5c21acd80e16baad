#!/usr/bin/env bash
# Takes down what slurm/up.sh FOLDER started, and nothing else: its jobs, then its daemons by their numbers.
set -u
folder=$1
export SLURM_CONF=$folder/slurm.conf
if [ -e "$folder/pids/slurmctld" ] && [ -e "$SLURM_CONF" ]; then
  timeout 10 scancel --user="$(id -un)" --full 2>/dev/null
  for _ in $(seq 100); do
    [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
    sleep 0.1
  done
fi
for name in "slurmd-*" slurmctld munged; do
  for file in "$folder"/pids/$name; do
    [ -e "$file" ] || continue
    number=$(cat "$file")
    kill "$number" 2>/dev/null
    for _ in $(seq 100); do
      kill -0 "$number" 2>/dev/null || break
      sleep 0.1
    done
    kill -9 "$number" 2>/dev/null
    rm -f "$file"
  done
done
exit 0
