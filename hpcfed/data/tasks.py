"""The ten tasks by name: their metric and, on the Hugging Face hub, where their columns are."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hpcfed.settings.config import Columns

Metric = Literal["accuracy", "matthews", "accuracy_f1", "loss"]


@dataclass(frozen=True)
class HubSource:
    """A data set on the hub, its splits, and which column is which."""

    path: str
    config: str | None
    train: str
    test: str
    columns: Columns
    rename: dict[Any, str] = field(default_factory=dict)  # label on the hub -> ours


@dataclass(frozen=True)
class TaskSpec:
    hub: HubSource
    metric: Metric = "accuracy"
    positive: str | None = None  # the class whose F1 counts


def _glue(config: str, *texts: str) -> HubSource:
    # GLUE hides its test labels, so its validation split is the test split, as in the literature.
    return HubSource("nyu-mll/glue", config, "train", "validation", Columns(*texts))


TASKS: dict[str, TaskSpec] = {
    "rte": TaskSpec(_glue("rte", "sentence1", "sentence2")),
    "mrpc": TaskSpec(_glue("mrpc", "sentence1", "sentence2"), "accuracy_f1", "equivalent"),
    "qnli": TaskSpec(_glue("qnli", "question", "sentence")),
    "boolq": TaskSpec(
        HubSource("google/boolq", None, "train", "validation",
                  Columns("question", "passage", "answer"), rename={True: "yes", False: "no"})
    ),
    "sst2": TaskSpec(_glue("sst2", "sentence")),
    "cola": TaskSpec(_glue("cola", "sentence"), "matthews"),
    "mr": TaskSpec(
        HubSource("cornell-movie-review-data/rotten_tomatoes", None, "train", "test", Columns(),
                  rename={"neg": "negative", "pos": "positive"})
    ),
    "mpqa": TaskSpec(
        HubSource("jxm/mpqa", None, "train", "test", Columns("sentence"),
                  rename={0: "negative", 1: "positive"})
    ),
    "subj": TaskSpec(
        HubSource("SetFit/subj", None, "train", "test", Columns(label="label_text"))
    ),
    "trec": TaskSpec(
        HubSource("SetFit/TREC-QC", None, "train", "test", Columns(label="label_coarse_original"))
    ),
}  # fmt: skip
