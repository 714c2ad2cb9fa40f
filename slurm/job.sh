# What the scripts beside this one share: the launch, and what follows from how it ended.
# Sourced by them; nothing to set here.
# shellcheck shell=bash

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

# What another life would not mend.
refuse() {
    say "$*"
    exit 2
}

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

# What passes from one life to the next stands at the end of the job's comment, the one thing that a
# requeued job keeps: how often it failed, and on which nodes it last ran. What you gave as --comment
# stays in front of it.
comment() { squeue --noheader --jobs "$SLURM_JOB_ID" --format %k; }

remembered() { # 1: failures, 2: nodes
    comment | sed -n "s/.*hpcfed failures=\([^ ]*\) nodes=\([^ ]*\).*/\\$1/p"
}

failures() {
    local known
    known=$(remembered 1)
    if [[ $known =~ ^[1-9][0-9]{0,3}$ ]]; then echo "$known"; else echo 0; fi
}

remember() { # failures, nodes
    local yours
    yours=$(comment)
    yours=${yours%%hpcfed failures=*}
    yours=${yours%"${yours##*[![:space:]]}"} # no blanks at the end
    [[ $yours != "(null)" ]] || yours=
    scontrol update "JobId=$SLURM_JOB_ID" "Comment=${yours:+$yours }hpcfed failures=$1 nodes=$2"
}

# Another life after a failure, at most three times. Preempted and timed-out lives that have committed
# a round do not count (code 75); those that have not got anywhere do (code 1), or a job whose time is
# too short for a round would be requeued for ever.
requeue_after_failure() {
    local failures
    failures=$(failures)
    if ((failures >= 3)); then
        say "failed $((failures + 1)) times; not requeued again"
        exit 1
    fi
    remember "$((failures + 1))" "$SLURM_JOB_NODELIST"
    requeue
}

# Nodes of the life before that are down now; it may have had no time to say so.
name_missing() {
    local node before
    before=$(remembered 2)
    [[ -n $before ]] || return 0
    for node in $(scontrol show hostnames "$before"); do
        case $(sinfo --noheader --nodes "$node" --format %T) in
            *down* | *fail* | *drain* | *\*) say "lost: $node is down" ;;
        esac
    done
}

# Whether one of the words sets the option.
is_set() { # option, words
    local word option=$1
    shift
    for word; do [[ $word != "$option="* ]] || return 0; done
    return 1
}

# What stands in front of a command that runs in the container, if there is one.
within=()
if [[ -n $CONTAINER ]]; then
    command -v apptainer >/dev/null || refuse "CONTAINER is set, but there is no apptainer on $(hostname)"
    [[ $CONTAINER == *://* || -e $CONTAINER ]] || refuse "CONTAINER is '$CONTAINER', which is not there"
    within=(apptainer exec --bind "$PWD${BINDS:+,$BINDS}" --pwd "$PWD")
    [[ $DEVICE == cpu ]] || within+=(--nv)
    within+=("$CONTAINER")
elif ! command -v "$PYTHON" >/dev/null; then
    refuse "PYTHON is '$PYTHON', which is not there; give the python that hpcfed is installed in"
fi

# federate SOURCE ARGUMENTS...: `hpcfed run SOURCE ARGUMENTS...` on all of the job's tasks.
federate() {
    local step code lost
    local source=$1 life=${SLURM_RESTART_COUNT:-0}
    shift
    # Bash's arithmetic runs commands that it finds in a text, so only numbers may get there.
    [[ $RANKS_PER_NODE =~ ^[1-9][0-9]{0,4}$ ]] ||
        refuse "RANKS_PER_NODE is '$RANKS_PER_NODE'; it must be a whole number, at least 1"
    [[ $life =~ ^[1-9][0-9]{0,4}$ ]] || life=0
    say "life $((life + 1)) on $SLURM_JOB_NODELIST: hpcfed run $source $*"
    name_missing
    remember "$(failures)" "$SLURM_JOB_NODELIST"
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
    local command=("${within[@]}" "$PYTHON" -m hpcfed run "$source")
    is_set cluster.grace_seconds "$@" || command+=("cluster.grace_seconds=$GRACE")
    is_set cluster.device "$@" || command+=("cluster.device=$DEVICE")
    [[ -z $RANKS_PER_CLIENT ]] || is_set cluster.ranks_per_client "$@" ||
        command+=("cluster.ranks_per_client=$RANKS_PER_CLIENT")
    command+=("$@" --no-live)
    case $LAUNCH in
        # A rank that dies alone would leave the others waiting: --wait ends the step.
        srun)
            srun --mpi=list 2>&1 | grep -qwF -- "$MPI_TYPE" ||
                refuse "MPI_TYPE is '$MPI_TYPE', which \`srun --mpi=list\` does not show; or use LAUNCH=mpirun"
            srun --mpi="$MPI_TYPE" --wait=60 --ntasks="$ranks" --ntasks-per-node="$RANKS_PER_NODE" \
                --cpus-per-task="$cpus" "${command[@]}" &
            ;;
        mpirun)
            PATH=$PATH:$(dirname "$PYTHON") # pip puts one beside python
            mpirun --bind-to none -n "$ranks" --map-by "ppr:$RANKS_PER_NODE:node" "${command[@]}" &
            ;;
        *) refuse "LAUNCH is '$LAUNCH'; it must be srun or mpirun" ;;
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
