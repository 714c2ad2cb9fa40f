"""The configuration: one frozen dataclass tree, every option with its help, type and range.

`hpcfed.settings.resolve` fills it from defaults < presets < YAML < command line. Nothing here reads
files.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from hpcfed import registry
from hpcfed.settings import counts
from hpcfed.settings.inputs import Adapter, Columns, Data, Model, Partition, Splits, Task, option
from hpcfed.settings.machine import Cluster, Collective

__all__ = [
    "Adapter",
    "Aggregation",
    "Cluster",
    "Collective",
    "Columns",
    "Config",
    "Curriculum",
    "Data",
    "Evaluation",
    "Federation",
    "Layers",
    "Local",
    "Model",
    "Partition",
    "Privacy",
    "Server",
    "Sharing",
    "Sparsity",
    "Splits",
    "Task",
    "Updates",
]


@dataclass(frozen=True)
class Federation:
    clients: int | None = option(
        100, "K: clients in the federation; null: natural clients are counted", at_least=1,
        at_most=1_000_000,
    )  # fmt: skip
    per_round: int = option(10, "m: clients sampled per round", at_least=1)
    pooled: bool = option(
        False,
        "the rows of all clients lie in one, which trains in every round, on as many samples as "
        "the sampled clients would",
    )
    rounds: int = option(30, "T: rounds", at_least=1, at_most=1_000_000)
    min_clients: int = option(
        1,
        "clients whose updates must come through; a round with fewer is drawn again with others, "
        "at most 3 times, then the run ends and can be resumed",
        at_least=1,
    )


@dataclass(frozen=True)
class Local:
    epochs: int = option(2, "local epochs per round", at_least=1)
    batch_size: int = option(8, "samples per optimizer step of the client", at_least=1)
    micro_batch: int | None = option(
        None,
        "samples per rank and forward; the rest is accumulated; null = no accumulation",
        at_least=1,
    )
    max_steps: int | None = option(
        None, "optimizer steps of a client in a round, at most; null = its epochs", at_least=1
    )
    lr: float = option(4.0e-3, "learning rate", above=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = option(
        "constant", "how local.lr falls from round to round; in a round it is constant"
    )
    lr_end: float = option(
        0.0, "cosine, linear: what local.lr falls to", at_least=0, counts=counts.SCHEDULED
    )
    optimizer: Literal["adamw", "adam", "sgd"] = option("adamw", "the client's optimizer")
    momentum: float = option(0.0, "sgd: momentum", at_least=0, below=1)
    moments: Literal["reset", "keep"] = option(
        "reset", "the optimizer's state: fresh every round, or kept by each client between its own"
    )
    weight_decay: float = option(0.0, "decoupled for adamw, L2 for adam and sgd", at_least=0)
    clip: float = option(1.0, "gradient norm limit; 0 = none", at_least=0)
    proximal: float = option(
        0.0, "mu of FedProx: pulls a client back to where its round began; 0 = off", at_least=0
    )
    control: bool = option(
        False, "control variates of SCAFFOLD: steps are corrected by what other clients would do"
    )


@dataclass(frozen=True)
class Curriculum:
    difficulty: str = option(
        "fisher", "what makes a batch hard", names=registry.DIFFICULTIES, counts=counts.PACED
    )
    pace: Literal["linear", "sqrt", "exp", "all"] = option(
        "all",
        "how the share of batches in use grows with the rounds; all: no curriculum",
    )
    start: float = option(
        0.5, "share of its batches that a client uses at first", above=0, at_most=1,
        counts=counts.PACED,
    )  # fmt: skip
    full_at: float = option(
        0.6, "share of the rounds after which all batches are in use, and no text is cut short",
        above=0, at_most=1, counts=counts.PACED_OR_CUT,
    )  # fmt: skip
    cut: Literal["none", "linear", "stage"] = option(
        "none",
        "how the number of tokens grows with the rounds at which training texts are cut, up to "
        "task.max_length: linear, or in one step; none: it is task.max_length throughout",
    )
    shortest: float = option(
        0.25, "share of task.max_length at which training texts are cut at first", above=0,
        at_most=1, counts=counts.CUT,
    )  # fmt: skip
    warmup: int = option(
        0,
        "rounds before anything is scored: batches in random order, all layers shared",
        at_least=0,
        counts=counts.WARM,
    )
    when: Literal["training", "first_use", "start"] = option(
        "training",
        "where difficulties come from: training: from training passes alone, so a client's first "
        "round has a random order; first_use: a pass of its own before a client's first round "
        "after the warm-up; start: such a pass for all clients at the end of the warm-up",
        counts=counts.MEASURED,
    )
    refresh: bool = option(
        True, "bring difficulties up to date in every training pass; costs no pass of its own",
        counts=counts.MEASURED,
    )  # fmt: skip


@dataclass(frozen=True)
class Layers:
    score: str = option("all", "which layers are shared", names=registry.SCORES, counts=counts.SENT)
    keep: float | Literal["lossless"] = option(
        0.5,
        "share of the layers that is shared (not for `all`), the rest stays personal; lossless: "
        "the data decide, see rule",
        above=0, at_most=1, counts=counts.CHOSEN,
    )  # fmt: skip
    rule: Literal["eigengap", "plateau", "agreement"] = option(
        "eigengap",
        "lossless: how the share is found: eigengap, plateau: from the spectrum of the Hessian; "
        "agreement: by how far clients' updates agree in the last warm-up round",
        counts=counts.LOSSLESS,
    )
    agree: float = option(
        0.1, "agreement: all layers are shared if clients agree by more, else half of them",
        at_least=-1, below=1, counts=counts.AGREEING,
    )  # fmt: skip
    sync_every: int | None = option(
        None, "s: every s-th round after the warm-up what stays home is averaged too, and a client "
        "that has none of its own begins with that; null: never", at_least=1, counts=counts.SYNCED,
    )  # fmt: skip
    probe_clients: int = option(
        10, "clients that are asked to score the layers and their number", at_least=1,
        counts=counts.ASKED,
    )  # fmt: skip


@dataclass(frozen=True)
class Sharing:
    rule: str = option(
        "layers", "which values travel, stay, or are frozen in a round", names=registry.SHARING
    )


@dataclass(frozen=True)
class Aggregation:
    rule: str = option(
        "mean", "what the server makes of the clients' LoRA factors", names=registry.AGGREGATIONS
    )
    ridge: float = option(
        0.01,
        "fair: how much the correction of B is held back, in units of the mean square of A's rows",
        above=0,
        counts=counts.FAIR,
    )
    first_stage: float = option(
        0.25, "slora: share of the rounds that train sparse values, before LoRA", above=0, below=1,
        counts=counts.SLORA,
    )  # fmt: skip
    budget: float = option(
        8.0, "budget: singular values that are left of each matrix at last, on average",
        above=0, at_most=65536, counts=counts.BUDGET,
    )  # fmt: skip
    prune_from: float = option(
        0.1, "budget: share of the rounds before singular values begin to go", at_least=0, below=1,
        counts=counts.BUDGET,
    )  # fmt: skip
    prune_to: float = option(
        0.5, "budget: share of the rounds after which no more go", above=0, at_most=1,
        counts=counts.BUDGET,
    )  # fmt: skip


@dataclass(frozen=True)
class Updates:
    transforms: tuple[str, ...] = option(
        (), "what changes clients' updates before they are added up", names=registry.UPDATES
    )
    least_rank: int = option(
        2, "hetlora, ranks: a client's rank is drawn from this to adapter.rank", at_least=1,
        counts=counts.RANKS,
    )  # fmt: skip
    rank_decay: float = option(
        0.0,
        "hetlora: a client's last rank shrinks by this each round, and is given up once it no "
        "longer grows; 0 = never",
        at_least=0,
        below=1,
        counts=counts.HETLORA,
    )


@dataclass(frozen=True)
class Sparsity:
    keep: float = option(
        1.0,
        "share of the neurons that trains in each matrix of the personal layers; 1 = all",
        above=0,
        at_most=1,
        counts=counts.PERSONAL,
    )
    momentum: float = option(
        0.9, "weight of earlier rounds in the neurons' Fisher information", at_least=0, below=1,
        counts=counts.SPARSE,
    )  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    every: int = option(5, "validate every so many rounds, and after the last", at_least=1)
    batch_size: int = option(64, "samples per forward in evaluation", at_least=1)
    clients: int | None = option(
        None,
        "evaluate on so many clients only, drawn once, with the error of their accuracy; null = on "
        "all",
        at_least=2,
    )
    max_new_tokens: int | None = option(
        None,
        "completion: also let the model answer the prompts of the test split, in at most so many "
        "tokens, and score the answers; null or 0: not",
        at_least=0, at_most=1_000_000, counts=counts.WRITES,
    )  # fmt: skip
    generate_in_validation: bool = option(
        False, "answer the prompts of the validation rows, too", counts=counts.WRITTEN
    )
    test: bool = option(
        True,
        "look at the test split, once, at the end; false: never, as in a run that only serves to "
        "choose something, on validation data",
    )
    before: bool = option(
        False, "look at it with the model as it was before the first round, too, at the end",
        counts=counts.TESTED,
    )  # fmt: skip


@dataclass(frozen=True)
class Server:
    optimizer: str = option(
        "mean", "what is made of the clients' n_k-weighted mean", names=registry.SERVERS,
        counts=counts.SENT,
    )  # fmt: skip
    gradient: Literal["pseudo_gradient", "difference"] = option(
        "pseudo_gradient", "momentum: of how far the mean moved, or of how that has changed"
    )
    control: bool = option(
        False, "momentum: control variates that make up for clients that were not sampled"
    )
    lr: float = option(1.0, "server learning rate (not for mean)", above=0, counts=counts.STEPS)
    lr_decay: float = option(
        1.0, "factor on the rate, every round", above=0, at_most=1, counts=counts.STEPS
    )
    momentum: float = option(
        0.9, "momentum; beta1 of adam and yogi", at_least=0, below=1, counts=counts.STEPS
    )
    beta2: float = option(
        0.99, "adam, yogi: decay of the second moment", at_least=0, below=1, counts=counts.ADAPTIVE
    )
    tau: float = option(
        1e-3, "adam, yogi: adaptivity, added to the root", above=0, counts=counts.ADAPTIVE
    )


@dataclass(frozen=True)
class Privacy:
    unit: Literal["client", "sample"] = option(
        "client",
        "what is hidden: that a client took part (DP-FedAvg), or that one of its rows did (DP-SGD "
        "in each client: rows are drawn for each step, each row's gradient is cut down)",
        counts=counts.PRIVATE,
    )
    epsilon: float | None = option(
        None,
        "differential privacy, at delta: the budget of the whole run; without noise the "
        "noise is solved for, for so many rounds",
        above=0,
        at_most=1000,
    )
    noise: float | None = option(
        None, "z: the noise on a sum of updates, or gradients, has z times clip as its deviation",
        at_least=0.1, at_most=1000,
    )  # fmt: skip
    delta: float = option(
        1e-5, "probability with which epsilon may not hold; well below 1/clients", above=0, below=1,
        counts=counts.PRIVATE,
    )  # fmt: skip
    clip: float | Literal["adaptive"] = option(
        1.0,
        "norm to which a client's update is cut down, over all that it sends, or a row's gradient, "
        "over all that trains; adaptive, of updates: the noised median of the norms, from 0.1 on",
        at_least=1e-6,
        at_most=1e6,
        counts=counts.PRIVATE,
    )
    secret: bool = option(
        True,
        "noise and sampled clients come from a key of this run's own that is kept from its files; "
        "false: from the public seed, for tests: whoever knows it can take the noise off",
        counts=counts.PRIVATE,
    )


@dataclass(frozen=True)
class Config:
    method: str = option(
        "lora-fedavg",
        "a preset, or a YAML file of your own; everything else may override it",
        path=True,
    )
    seed: int = option(42, "every random draw derives from it", at_least=0, at_most=2**63 - 1)
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    task: Task = field(default_factory=Task)
    data: Data = field(default_factory=Data)
    federation: Federation = field(default_factory=Federation)
    local: Local = field(default_factory=Local)
    curriculum: Curriculum = field(default_factory=Curriculum)
    layers: Layers = field(default_factory=Layers)
    sharing: Sharing = field(default_factory=Sharing)
    updates: Updates = field(default_factory=Updates)
    aggregation: Aggregation = field(default_factory=Aggregation)
    sparsity: Sparsity = field(default_factory=Sparsity)
    evaluation: Evaluation = field(default_factory=Evaluation)
    server: Server = field(default_factory=Server)
    privacy: Privacy = field(default_factory=Privacy)
    collective: Collective = field(default_factory=Collective)
    cluster: Cluster = field(default_factory=Cluster)
    deepspeed: str = option(
        "ds_configs/zero0.json",
        "a plain DeepSpeed JSON file: yours, or one that hpcfed brings",
        path=True,
    )
    plugins: tuple[str, ...] = option(
        (),
        "Python files of your own that register parts of a method, see docs/add-a-method.md",
        path=True,
    )
    tracker: Literal["none", "tensorboard", "wandb"] = option(
        "none", "who else gets the metrics of each round, besides metrics.jsonl"
    )
    output: str = option(
        "runs/{task}-{method}-{seed}", "run directory; must not exist yet, unless with --resume",
        path=True,
    )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, as written to config.yaml and config.json."""
        return dataclasses.asdict(self)
