#!/usr/bin/env bash
# A real Slurm cluster of two hosts inside this machine: a head (slurmctld, slurmdbd, MariaDB, munge)
# and the nodes n1 and n2 (slurmd, sshd), each with its own network, name, processes, /dev/shm and
# temporary folder. All of it lives in namespaces whose first process is this script: when that one
# dies, processes, mounts, bridge, keys and host names are gone.
#
#   unshare --net --uts --mount --pid --fork --kill-child --mount-proc lab.sh head FOLDER
#
# Inside, FOLDER/lab is a file system of its own. FOLDER/ready appears when jobs can be submitted.
set -euo pipefail

here=$(readlink -f "$0")
network=10.77.0
nodes=(n1 n2)
export SLURM_CONF

note() { printf '%(%T)T %s\n' -1 "$*" >&2; }

# Wait at most $1 seconds until the command succeeds.
await() {
    local seconds=$1
    shift
    for ((i = 0; i < seconds * 5; i++)); do
        if "$@" >/dev/null 2>&1; then return 0; fi
        sleep 0.2
    done
    note "not within $seconds s: $*"
    return 1
}

write_config() {
    {
        echo "127.0.0.1 localhost"
        echo "$network.254 head"
        for i in "${!nodes[@]}"; do echo "$network.$((i + 1)) ${nodes[i]}"; done
    } >"$lab/hosts"
    cat >"$lab/slurmdbd.conf" <<END
AuthType=auth/munge
DbdHost=head
SlurmUser=root
StorageType=accounting_storage/mysql
StorageLoc=slurm_acct_db
StorageUser=root
PidFile=$lab/slurmdbd.pid
LogFile=$lab/log/slurmdbd.log
END
    chmod 600 "$lab/slurmdbd.conf"
    cat >"$lab/slurm.conf" <<END
ClusterName=lab
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=head
JobAcctGatherType=jobacct_gather/linux
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=pmix
ReturnToService=2
JobRequeue=1
SlurmdTimeout=15
KillWait=10
MinJobAge=3600
SlurmdParameters=config_overrides
TmpFS=/var/tmp
StateSaveLocation=$lab/state
SlurmdSpoolDir=$lab/spool-%n
SlurmctldPidFile=$lab/slurmctld.pid
SlurmdPidFile=$lab/slurmd-%n.pid
SlurmctldLogFile=$lab/log/slurmctld.log
SlurmdLogFile=$lab/log/slurmd-%n.log
NodeName=n[1-2] CPUs=8 RealMemory=8000 TmpDisk=0 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

# Own copies of what the services keep in fixed places; not even a folder is made outside of them.
mount_private() {
    mount --make-rprivate /
    for place in "$folder/lab" /run /var/tmp /etc/ssh/ssh_config.d; do mount -t tmpfs lab "$place"; done
    mkdir -p "$lab"/{log,state,ssh,db} /run/{munge,mysqld,sshd}
    chmod 755 "$lab"
    chmod 1777 /var/tmp
}

start_head() {
    hostname head
    ip link set lo up
    ip link add hub type bridge
    ip address add "$network.254/24" dev hub
    ip link set hub up
    mount_private
    write_config
    mount --bind "$lab/hosts" /etc/hosts
    SLURM_CONF=$lab/slurm.conf

    for name in client host; do ssh-keygen -q -t ed25519 -N '' -f "$lab/ssh/$name"; done
    for node in "${nodes[@]}"; do echo "$node $(cut -d' ' -f1,2 "$lab/ssh/host.pub")"; done \
        >"$lab/ssh/known_hosts"
    cat >/etc/ssh/ssh_config.d/lab.conf <<END
Host *
  IdentityFile $lab/ssh/client
  UserKnownHostsFile $lab/ssh/known_hosts
  LogLevel ERROR
  ConnectTimeout 10
END

    dd if=/dev/urandom of="$lab/munge.key" bs=128 count=1 status=none
    chmod 400 "$lab/munge.key"
    munged --force --key-file "$lab/munge.key" --log-file "$lab/log/munged.log" \
        --pid-file "$lab/munged.pid" --seed-file "$lab/munge.seed"
    mysql_install_db --no-defaults --user=root --datadir="$lab/db" --skip-test-db \
        >"$lab/log/mariadb.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$lab/db" --skip-networking --skip-grant-tables \
        --innodb-buffer-pool-size=32M --innodb-log-file-size=16M \
        --socket=/run/mysqld/mysqld.sock >>"$lab/log/mariadb.log" 2>&1 &
    await 60 mariadb-admin --no-defaults --socket=/run/mysqld/mysqld.sock ping
    (cd "$lab" && exec slurmdbd -D) >"$lab/log/slurmdbd.out" 2>&1 &
    await 60 sacctmgr --immediate list cluster
    sacctmgr --immediate add cluster lab >"$lab/log/sacctmgr.log" 2>&1 || true
    slurmctld -D >"$lab/log/slurmctld.out" 2>&1 &
    await 60 scontrol ping
    for node in "${nodes[@]}"; do start_node "$node"; done
    for node in "${nodes[@]}"; do await 60 is_idle "$node"; done
    touch "$folder/ready"
    note "the cluster is up"
    # Start a node again when FOLDER/start-NODE appears; processes that end are reaped meanwhile.
    while true; do
        for node in "${nodes[@]}"; do
            if [[ -e $folder/start-$node ]]; then
                start_node "$node"
                rm "$folder/start-$node"
            fi
        done
        sleep 0.5
    done
}

is_idle() { [[ $(sinfo --noheader --nodes "$1" --format %t) == idle ]]; }

start_node() {
    local node=$1 number=${1#n}
    rm -f "$lab/plugged-$node" "$lab/pid-$node"
    unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
        "$here" node "$folder" "$node" >>"$lab/log/$node.out" 2>&1 &
    # The node's first process is the child of unshare.
    local parent=$!
    await 10 pgrep --parent "$parent"
    pgrep --parent "$parent" >"$lab/pid-$node"
    ip link delete "to-$node" 2>/dev/null || true
    ip link add "to-$node" type veth peer name eth0 netns "$(cat "$lab/pid-$node")"
    ip link set "to-$node" master hub up
    echo "$network.$number" >"$lab/plugged-$node"
}

run_node() {
    local node=$1
    hostname "$node"
    await 10 test -e "$lab/plugged-$node"
    ip link set lo up
    ip address add "$(cat "$lab/plugged-$node")/24" dev eth0
    ip link set eth0 up
    mount --make-rprivate /
    mount -t tmpfs shm /dev/shm
    mount -t tmpfs tmp /var/tmp
    chmod 1777 /var/tmp
    # What a lost node left there would keep PMIx from starting a step of the same job.
    rm -rf "$lab/spool-$node"
    mkdir "$lab/spool-$node"
    /usr/sbin/sshd -D -e -h "$lab/ssh/host" -o PidFile=none -o StrictModes=no \
        -o AuthorizedKeysFile="$lab/ssh/client.pub" -o SetEnv=TMPDIR=/var/tmp &
    exec slurmd -D -N "$node"
}

folder=$2
lab=$folder/lab
SLURM_CONF=$lab/slurm.conf
case $1 in
    head) start_head ;;
    node) run_node "$3" ;;
esac
