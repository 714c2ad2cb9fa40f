#!/usr/bin/env bash
# FedPepTAO on a Slurm cluster, on 1 node or on 64.
#
#   sbatch slurm/fedpeptao.sh task.name=trec model.name=roberta-large
#
# Whatever stands after the script goes to `hpcfed run fedpeptao`. What sbatch knows may stand before it, as
# in `sbatch --nodes=8 --account=mine slurm/fedpeptao.sh ...`; the other values are variables, as in
# `RANKS_PER_CLIENT=4 sbatch slurm/fedpeptao.sh ...`. docs/slurm.md explains each.
# Where nodes have no GPUs: `DEVICE=cpu sbatch --gpus-per-node= slurm/fedpeptao.sh ...`.

#SBATCH --job-name=fedpeptao
##SBATCH --account=       # remove one # and fill in what your site wants
##SBATCH --partition=
#SBATCH --gpus-per-node=4
#SBATCH --nodes=1
#SBATCH --exclusive
##SBATCH --mem=0           # with --exclusive: all memory of the node, where sites give it by CPU
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# module load openmpi                   # what your site's MPI and CUDA want
# source ~/miniforge3/bin/activate NAME # a conda environment; or: source VENV/bin/activate; PYTHON=python
PYTHON=${PYTHON:-.venv/bin/python}      # with CONTAINER: the python in the image, as python3
SCRIPTS=${SCRIPTS:-slurm}               # the folder of this script
RANKS_PER_NODE=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-4}} # one rank a GPU
RANKS_PER_CLIENT=${RANKS_PER_CLIENT:-}  # GPUs that share a client's model; empty: as configured
DEVICE=${DEVICE:-cuda}                  # cuda: a run that sees no GPU is refused; or cpu, auto
LAUNCH=${LAUNCH:-srun}                  # or mpirun
MPI_TYPE=${MPI_TYPE:-pmix}              # of `srun --mpi=list`, what your MPI speaks: pmix, pmi2, cray_shasta
GRACE=${GRACE:-100}                     # seconds from --signal to the limit, less a margin
INTERFACE=${INTERFACE:-}                # network interface of NCCL and Gloo, as ib0; empty: they choose
HF_CACHE=${HF_CACHE:-}                  # folder of models fetched before; makes Hugging Face offline
CONTAINER=${CONTAINER:-}                # an Apptainer image to run in
BINDS=${BINDS:-}                        # folders that it sees besides this one, as /data,/scratch

cd "$SLURM_SUBMIT_DIR" || exit 2
# shellcheck source=slurm/job.sh
source "$SCRIPTS/job.sh" || exit 2 # submit from the folder that holds slurm/; or see `hpcfed scripts`
federate fedpeptao "$@"
