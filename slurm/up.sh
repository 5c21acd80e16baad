#!/usr/bin/env bash
# A SLURM cluster for a trial, on this machine alone: a controller and some nodes that are all this computer, with their files,
# their keys and their sockets under one folder.
#
#   slurm/up.sh FOLDER [NODES]     then  source FOLDER/environment  and use sbatch, squeue, cfssl submit
#   slurm/down.sh FOLDER
#
# Partitions: "batch" (default), whose jobs give way, and "urgent", whose jobs take their nodes: what they displace is told by
# USR2 and TERM, has 10 seconds, and is queued again. No accounting. As root; Debian: slurmctld slurmd slurm-client munge.
# CPUS and MEMORY (MiB) are what a node offers; PORT is the first of NODES + 1.
set -euo pipefail

nodes=${2:-2} cpus=${CPUS:-2} memory=${MEMORY:-4000} port=${PORT:-26900}
mkdir -p "$1"
folder=$(cd "$1" && pwd)
host=$(hostname -s)

for tool in slurmctld slurmd munged scontrol; do
  PATH=$PATH:/usr/sbin command -v "$tool" >/dev/null || {
    echo "$tool is not there; install it (Debian: apt-get install slurmctld slurmd slurm-client munge)." >&2
    exit 2
  }
done
PATH=$PATH:/usr/sbin
if compgen -G "$folder/pids/*" >/dev/null; then
  echo "A cluster is up under $folder; take it down first (slurm/down.sh $folder)." >&2
  exit 2
fi
rm -rf "$folder"/{state,spool,logs}
mkdir -p "$folder"/{state,spool,logs,pids,munge}
chmod 755 "$folder" "$folder/munge"

daemon() { # NAME COMMAND...: runs on after this script, in a session of its own; its number is noted
  local name=$1
  shift
  setsid "$@" </dev/null >"$folder/logs/$name.out" 2>&1 &
  echo $! >"$folder/pids/$name"
}

wait_for() { # WHAT SECONDS COMMAND...: until the command succeeds
  local what=$1 tries=$(($2 * 10))
  shift 2
  until "$@" >/dev/null 2>&1; do
    tries=$((tries - 1))
    if [ $tries -le 0 ]; then
      echo "$what did not come up; see $folder/logs." >&2
      tail -n 15 "$folder"/logs/* >&2
      exit 1
    fi
    sleep 0.1
  done
}

socket=$folder/munge/socket
[ -s "$folder/munge/key" ] || (umask 077 && head -c 256 /dev/urandom >"$folder/munge/key")
daemon munged munged --foreground --force --key-file="$folder/munge/key" --socket="$socket" \
  --pid-file="$folder/munge/pid" --seed-file="$folder/munge/seed" --log-file="$folder/logs/munged.log"
wait_for munged 10 munge -S "$socket" -n

{
  cat <<CONFIGURATION
ClusterName=trial
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits for its old credential to expire, plus a second; 5 is the least that counts.
AuthInfo=socket=$socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/spool/slurmctld.pid
SlurmdPidFile=$folder/spool/slurmd-%n.pid
SlurmctldLogFile=$folder/logs/slurmctld.log
SlurmdLogFile=$folder/logs/slurmd-%n.log
# Nothing of this needs control groups, so that it runs in a container as well.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
CONFIGURATION
  for node in $(seq "$nodes"); do
    echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=$cpus RealMemory=$memory"
  done
  echo "PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=10"
  echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
} >"$folder/slurm.conf"
export SLURM_CONF=$folder/slurm.conf
echo "export SLURM_CONF=$SLURM_CONF" >"$folder/environment"

daemon slurmctld slurmctld -D -c -i
for node in $(seq "$nodes"); do
  mkdir -p "$folder/spool/n$node"
  daemon "slurmd-n$node" slurmd -D -N "n$node"
done
all_idle() { [ "$(sinfo -h -N -p batch -t idle -o %N | sort -u | wc -l)" = "$nodes" ]; }
wait_for "The cluster" 40 all_idle
sinfo
