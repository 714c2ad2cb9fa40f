"""Launches that cannot be: what is wrong, the command line, and the sentence that it ends with.

`tests/unit/test_wrong_launches.py` runs them, each in a folder that holds FILES and nothing else,
without Slurm; `sbatch` there is tests/unit/fake_slurm.py. {clone} is this checkout.
"""

# Name -> content of the files that lie where the command is given.
FILES = {
    "sweep.yaml": "source: demo\nfolder: runs/s\nexecutor: slurm\ncluster: {tasks_per_node: 2}\n",
    "crowd.yaml": "source: demo\nfolder: runs/s\nexecutor: local\ncluster: {nodes: 5000}\n"
    "overrides: {cluster.ranks_per_client: 1}\n",
    "output.yaml": "source: demo\nfolder: runs/s\noverrides: {output: runs/mine}\n"
    "cluster: {tasks_per_node: 2}\n",
    "number.yaml": "source: demo\nfolder: runs/s\ngrid: {1: [2]}\n",
    "mine/slurm/fibecfed.sh": "# edited\n",
    "notes.txt": "",
}

# (what is wrong, the words of the command line with variables in front, regex of the sentence)
CASES: list[tuple[str, list[str], str]] = [
    (
        "no ranks",
        ["hpcfed", "run", "demo", "--ranks", "0"],
        r"--ranks is 0; it must be at least 1",
    ),
    (
        "ten thousand ranks on a few cores",
        ["hpcfed", "run", "demo", "--ranks", "10000"],
        r"--ranks is 10000, but this machine gives \d+ cores?.*start at most \d+, or say "
        r"--oversubscribe",
    ),
    (
        "the doctor with too many ranks",
        ["hpcfed", "doctor", "--ranks", "10000"],
        r"--ranks is 10000.*--oversubscribe",
    ),
    (
        "the doctor with two configurations",
        ["hpcfed", "doctor", "demo", "fibecfed"],
        r"'demo' and 'fibecfed' are two configurations; give one",
    ),
    (
        "the doctor with a model twice",
        ["hpcfed", "doctor", "--model", "a/b", "model.name=a/c"],
        r"model\.name is given twice",
    ),
    (
        "the doctor with a configuration that is not there",
        ["hpcfed", "doctor", "nowhere.yaml"],
        r"nowhere\.yaml.* is neither a YAML file nor a preset",
    ),
    (
        "ranks that make no whole clients",
        ["hpcfed", "run", "demo", "--ranks", "3"],
        r"3 MPI ranks do not divide into slots of cluster\.ranks_per_client=2",
    ),
    (
        "a device that there is none of",
        ["hpcfed", "run", "demo", "cluster.device=gpu", "--ranks", "2"],
        r"cluster\.device .*'gpu'.*cuda",
    ),
    (
        "a DeepSpeed JSON that is not there",
        ["hpcfed", "run", "demo", "deepspeed=ds_configs/zero9.json", "--ranks", "2"],
        r"'ds_configs/zero9\.json' does not exist; there are: ds_configs/offload\.json",
    ),
    (
        "a plan for no nodes",
        ["hpcfed", "plan", "demo", "--nodes", "0"],
        r"--nodes and --gpus must be at least 1",
    ),
    (
        "a sweep file that is not there",
        ["hpcfed", "sweep", "submit", "nowhere.yaml"],
        r"nowhere\.yaml cannot be read",
    ),
    (
        "a sweep without Slurm",
        ["hpcfed", "sweep", "submit", "sweep.yaml"],
        r"There is no srun here.*--executor local",
    ),
    (
        "a sweep that sets output",
        ["hpcfed", "sweep", "submit", "output.yaml"],
        r"output\.yaml: output is not a sweep's to set.*set folder",
    ),
    (
        "a sweep over an option that is a number",
        ["hpcfed", "sweep", "submit", "number.yaml"],
        r"number\.yaml: 1 is no option; write section\.key",
    ),
    (
        "a sweep on this machine with too many ranks",
        ["hpcfed", "sweep", "submit", "crowd.yaml"],
        r"cluster\.nodes x cluster\.tasks_per_node is 5000, but this machine gives .*start at most",
    ),
    (
        "a line that the sweep does not have",
        ["hpcfed", "sweep", "line", "7", "sweep.yaml"],
        r"There is no run 7: the sweep has 1, numbered from 0; use --array=0-0",
    ),
    (
        "another output for a line of a sweep",
        ["hpcfed", "sweep", "line", "0", "sweep.yaml", "output=runs/mine"],
        r"output cannot be set for a run of a sweep",
    ),
    (
        "scripts over files of yours",
        ["hpcfed", "scripts", "mine"],
        r"mine/slurm/fibecfed\.sh exists already; remove it, or give another folder",
    ),
    (
        "scripts into a file",
        ["hpcfed", "scripts", "notes.txt"],
        r"notes\.txt cannot be written",
    ),
    (
        "ranks a node that are no number",
        ["RANKS_PER_NODE=four", "sbatch", "{clone}/slurm/fibecfed.sh"],
        r"RANKS_PER_NODE is 'four'; it must be a whole number, at least 1",
    ),
    (
        "a launcher that there is none of",
        ["LAUNCH=mpiexec", "sbatch", "{clone}/slurm/fibecfed.sh"],
        r"LAUNCH is 'mpiexec'; it must be srun or mpirun",
    ),
    (
        "a kind of MPI that srun does not have",
        ["MPI_TYPE=pmx", "sbatch", "{clone}/slurm/fibecfed.sh"],
        r"MPI_TYPE is 'pmx', which `srun --mpi=list` does not show",
    ),
    (
        "no python where PYTHON says",
        ["PYTHON=nowhere/bin/python", "sbatch", "{clone}/slurm/fedpeptao.sh"],
        r"PYTHON is 'nowhere/bin/python', which is not there",
    ),
    (
        "a container without Apptainer",
        ["CONTAINER=image.sif", "sbatch", "{clone}/slurm/fibecfed.sh"],
        r"CONTAINER is set, but there is no apptainer on ",
    ),
    (
        "a script submitted from another folder than that of slurm/",
        ["SCRIPTS=slurm", "sbatch", "{clone}/slurm/fibecfed.sh"],
        r"slurm/job\.sh: No such file",
    ),
    (
        "a line of a job array that the sweep does not have",
        ["SLURM_ARRAY_TASK_ID=7", "sbatch", "{clone}/slurm/sweep.sh", "sweep.yaml"],
        r"There is no run 7",
    ),
]
