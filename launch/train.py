"""One entry for every launcher: what stands after it is what stands after `hpcfed run`.

deepspeed --num_nodes 2 --hostfile H launch/train.py fibecfed task.name=trec
deepspeed --num_nodes 2 --hostfile H --launcher slurm --launcher_args=--mpi=pmix launch/train.py ...
deepspeed --hostfile H --launcher openmpi launch/train.py ...
mpirun -n 8 python launch/train.py ...
srun --mpi=pmix python launch/train.py ...
python launch/train.py ...
"""

import sys

from hpcfed.app.cli import main

if __name__ == "__main__":
    # DeepSpeed's launcher puts this in front; ranks find their place by MPI.
    sys.exit(main(["run", *(w for w in sys.argv[1:] if not w.startswith("--local_rank="))]))
