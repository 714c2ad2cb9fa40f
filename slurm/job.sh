# What the scripts beside this one share: the launch, and what follows from how it ended.
# Sourced by them; nothing to set here.
# shellcheck shell=bash

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

# Which of the job's nodes do not answer; all are asked at once.
lost_nodes() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        timeout 5 srun --overlap --nodes=1 --ntasks=1 --nodelist="$node" --mpi=none true \
            >/dev/null 2>&1 || echo "$node" &
    done
    wait
}

requeue() {
    say "requeued; its next life goes on from the last committed round"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # the requeue ends this script
    exit 1
}

# What passes from one life to the next lies in the job's comment, the one thing that a requeued job
# keeps: how often it failed, and on which nodes it last ran.
remembered() { squeue --noheader --jobs "$SLURM_JOB_ID" --format %k | sed -n "s/.*$1=\([^ ]*\).*/\1/p"; }

remember() { # failures, nodes
    scontrol update "JobId=$SLURM_JOB_ID" "Comment=hpcfed failures=$1 nodes=$2"
}

# Another life after a failure, at most three times. Preempted and timed-out lives that have committed
# a round do not count (code 75); those that have not got anywhere do (code 1), or a job whose time is
# too short for a round would be requeued for ever.
requeue_after_failure() {
    local failures
    failures=$(remembered failures)
    if ((${failures:-0} >= 3)); then
        say "failed $((failures + 1)) times; not requeued again"
        exit 1
    fi
    remember "$((${failures:-0} + 1))" "$SLURM_JOB_NODELIST"
    requeue
}

# Nodes of the life before that are down now; it may have had no time to say so.
name_missing() {
    local node before
    before=$(remembered nodes)
    [[ -n $before ]] || return 0
    for node in $(scontrol show hostnames "$before"); do
        case $(sinfo --noheader --nodes "$node" --format %T) in
            *down* | *fail* | *drain* | *\*) say "lost: $node is down" ;;
        esac
    done
}

# federate SOURCE ARGUMENTS...: `hpcfed run SOURCE ARGUMENTS...` on all of the job's tasks.
federate() {
    local step code lost
    local source=$1
    shift
    say "life $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: hpcfed run $source $*"
    name_missing
    remember "$(remembered failures)" "$SLURM_JOB_NODELIST"
    local ranks=$((SLURM_JOB_NUM_NODES * RANKS_PER_NODE))
    local cpus=$((SLURM_CPUS_ON_NODE / RANKS_PER_NODE))
    ((cpus)) || cpus=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
    if [[ -n $INTERFACE ]]; then
        export NCCL_SOCKET_IFNAME=$INTERFACE GLOO_SOCKET_IFNAME=$INTERFACE
    fi
    if [[ -n $HF_CACHE ]]; then
        export HF_HOME=$HF_CACHE HF_HUB_OFFLINE=1 # compute nodes rarely reach the hub
    fi
    local command=("$PYTHON" -m hpcfed run "$source" "cluster.grace_seconds=$GRACE")
    [[ -z $RANKS_PER_CLIENT ]] || command+=("cluster.ranks_per_client=$RANKS_PER_CLIENT")
    command+=("$@" --no-live)
    [[ -z $CONTAINER ]] || command=(apptainer exec --nv "$CONTAINER" "${command[@]}")
    case $LAUNCH in
        # A rank that dies alone would leave the others waiting: --wait ends the step.
        srun)
            srun --mpi=pmix --wait=60 --ntasks="$ranks" --ntasks-per-node="$RANKS_PER_NODE" \
                --cpus-per-task="$cpus" "${command[@]}" &
            ;;
        mpirun)
            PATH=$PATH:$(dirname "$PYTHON") # pip puts one beside python
            mpirun --bind-to none -n "$ranks" --map-by "ppr:$RANKS_PER_NODE:node" "${command[@]}" &
            ;;
        *)
            say "LAUNCH is '$LAUNCH'; it must be srun or mpirun"
            exit 2
            ;;
    esac
    step=$!
    # Slurm signals this shell; the ranks hear of it through their launcher.
    trap 'say "time is nearly up"; kill -USR1 "$step" 2>/dev/null' USR1
    trap 'kill -TERM "$step" 2>/dev/null' TERM
    while true; do
        code=0
        wait "$step" || code=$?
        kill -0 "$step" 2>/dev/null || break # else it was a signal that ended the wait
    done
    case $code in
        0) exit 0 ;;
        2) exit 2 ;; # a sentence above says what to mend; another life would not
        75) requeue ;;
    esac
    say "the run ended with code $code"
    lost=$(lost_nodes | sort | paste -sd ' ')
    [[ -z $lost ]] || say "lost: $lost does not answer"
    requeue_after_failure
}
