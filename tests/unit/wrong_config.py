"""Wrong configurations: YAML, overrides, options, DeepSpeed JSON.

CASES: (what is wrong, a function that builds the input in a folder and returns the words after
`hpcfed run`, a regular expression of what is said). tests/unit/test_wrong_config.py runs them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = tuple[str, Callable[[Path], list[str]], str]

PRESET = "lora-fedavg"


def words(*given: str, preset: str = PRESET) -> Callable[[Path], list[str]]:
    """A preset, and these overrides."""
    return lambda folder: [preset, *given]


def file(content: str | bytes, *given: str, name: str = "my.yaml") -> Callable[[Path], list[str]]:
    """A YAML file with this content, and these overrides."""

    def build(folder: Path) -> list[str]:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [str(path), *given]

    return build


def deepspeed(content: Any, *given: str) -> Callable[[Path], list[str]]:
    """A DeepSpeed JSON with this content; a text or bytes as they are."""

    def build(folder: Path) -> list[str]:
        path = folder / "ds.json"
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return [PRESET, f"deepspeed={path}", *given]

    return build


def zero(stage: Any = 2, **keys: Any) -> dict[str, Any]:
    """The content of a JSON with this section."""
    return {"zero_optimization": {"stage": stage, **keys}}


def folder_as_json(folder: Path) -> list[str]:
    (folder / "configs").mkdir()
    return [PRESET, f"deepspeed={folder / 'configs'}"]


def existing_output(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    return [PRESET, "output=run"]


def output_in_a_file(folder: Path) -> list[str]:
    (folder / "notes").write_text("a file\n")
    return [PRESET, "output=notes/run"]


def preset_of_itself(folder: Path) -> list[str]:
    (folder / "one.yaml").write_text("base: two.yaml\n")
    (folder / "two.yaml").write_text("base: one.yaml\n")
    return [str(folder / "one.yaml")]


def broken_plugin(folder: Path) -> list[str]:
    (folder / "mine.py").write_text("import hpcfed\n1 / 0\n")
    return [PRESET, f"plugins={folder / 'mine.py'}"]


YAML: list[Case] = [
    ("no such file or preset", words(preset="demmo"), r"neither a YAML file nor.*'demo'"),
    ("a name of 5,000 characters", words(preset="x" * 5000), r"neither a YAML file nor a preset"),
    ("no YAML", file("a: b: c\n"), r"my\.yaml, line 1: not valid YAML"),
    ("not UTF-8", file("# Größe\n".encode("latin-1")), r"not UTF-8 \(byte 4\)"),
    ("a NUL character", file("seed: 1\0\n"), r"not valid YAML"),
    ("a list at the top", file("- 1\n"), r"top level must be keys and values, not a list"),
    ("a key twice", file("local: {lr: 1, lr: 2}\n"), r"line 1.*the key 'lr' is given twice"),
    ("a section twice", file("seed: 1\nlocal: {lr: 1}\nlocal: {}\n"), r"line 3.*'local'.*twice"),
    ("an alias to what holds it", file("local: &a {lr: *a}\n"), r"line 1.*it holds itself"),
    ("deep nesting", file("seed: " + "[" * 5000), r"not valid YAML.*more than 30 levels"),
    ("aliases that multiply", file(
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
                  for a, b in zip("abcdef", "bcdefg", strict=True))
    ), r"more than 30 levels or 100,000 values"),
    ("an unknown alias", file("seed: *x\n"), r"undefined alias 'x'"),
    ("a Python object", file("seed: !!python/object:os.system {}\n"), r"line 1: not valid YAML"),
    ("a date that is none", file("seed: 2026-13-45\n"), r"'2026-13-45' is no timestamp"),
    ("a number of 5,000 digits in a directive", file("%YAML " + "1" * 5000), r"not valid YAML"),
    ("an escape that is no character", file(r'seed: "\UFFFFFFFF"'), r"not valid YAML"),
    ("a long unknown alias", file("*" + "x" * 5000), r"not valid YAML \(found undefined alias"),
    ("an empty section", file("local:\n"), r"local \(.*my\.yaml\) must be a section.*not null"),
    ("a list for a section", file("local: [1]\n"), r"must be a section.*not a list"),
    ("a dotted key", file("local.lr: 0.1\n"), r"write it as `local: \{lr: \.\.\.\}`"),
    ("an unknown section", file("locl: {lr: 1}\n"), r"Unknown key 'locl' \(.*did you mean 'local'"),
    ("a key that is no text", file("5: 3\n"), r"Unknown key '5'"),
    ("method is null", file("method: null\n"), r"method is null"),
    ("base is null", file("base: null\n"), r"method is null"),
    ("an unknown method", file("method: fedavgg\n"), r"Unknown preset 'fedavgg'.*'fedavgm'"),
    ("a number to the base of 8", file("seed: 010\n"), r"'010' is .* base of 8 or 60"),
    ("a number to the base of 60", file("seed: 1:30\n"), r"line 1.*'1:30' is .* base of 8 or 60"),
    ("presets that build on each other", preset_of_itself, r"builds on itself"),
    ("a switch in quotes", file("local: {control: 'true'}\n"), r"true or false, not 'true'"),
]  # fmt: skip

OVERRIDES: list[Case] = [
    ("no equals sign", words("seed"), r"must look like section\.key=value"),
    ("no key", words("=3"), r"must look like section\.key=value"),
    ("an empty part of a key", words("local..lr=3"), r"must look like section\.key=value"),
    ("a key of a thousand parts", words(".".join("a" * 1000) + "=1"), r"no option lies so deep"),
    ("no YAML", words("seed=["), r"not valid YAML"),
    ("a tab", words("seed=\t- 1"), r"not valid YAML"),
    ("a key twice", words("seed=1", "seed=2"), r"seed is given twice \('seed=1' and 'seed=2'\)"),
    ("a section over a key of it", words("federation.clients=6", "federation={clients: 3}"),
     r"federation\.clients is given twice"),
    ("a number for a section", words("federation=3", "federation.clients=6"),
     r"federation\.clients is given twice"),
    ("a number for a section, alone", words("federation=3"), r"must be a section.*not a number"),
    ("method is null", words("method=null"), r"method is null"),
    ("a key of other sections", words("lr=1"), r"did you mean 'local\.lr' or 'server\.lr'"),
    ("a typing error", words("local.lrr=1"), r"'local\.lrr'.*did you mean 'local\.lr'"),
    ("base on the command line", words("base=fedprox"), r"Unknown key 'base'"),
]  # fmt: skip

OPTIONS: list[Case] = [
    ("no number", words("local.lr=fast"), r"local\.lr \(command line\) must be a number"),
    ("infinite", words("local.lr=.inf"), r"local\.lr.*must be finite"),
    ("infinite alpha", words("adapter.alpha=.inf"), r"adapter\.alpha.*must be finite"),
    ("not a number", words("local.clip=.nan"), r"local\.clip.*out of range"),
    ("beyond single precision", words("local.lr=1e300"), r"local\.lr .*at most 1e\+38"),
    ("an endless time-out", words("cluster.timeout_minutes=1e300"), r"at most 525,600"),
    ("a number of 5,000 digits", words("seed=" + "9" * 5000), r"no int that can be used"),
    ("a number of 80 bits", words(f"seed={2**80}"), r"no int that can be used"),
    ("below the range", words("local.lr=0"), r"out of range: it must be above 0"),
    ("half an epoch", words("local.epochs=1.5"), r"must be a whole number, not 1\.5"),
    ("a switch for a number", words("local.epochs=true"), r"must be a whole number, not True"),
    ("a rank beyond all", words("adapter.rank=1000000000000"), r"at most 65,536"),
    ("a length beyond all", words("task.max_length=1000000000000000"), r"at most 1,000,000"),
    ("more clients than names", words("federation.clients=10000000"), r"at most 1,000,000"),
    ("10 billion threads", words("cluster.threads=10000000000"), r"cluster\.threads"),
    ("5,000 threads", words("cluster.threads=5000"), r"threads is 5000, and this machine has \d+"),
    ("null", words("federation.rounds=null"), r"federation\.rounds.*not null"),
    ("an unknown choice", words("model.dtype=fp8"), r"choose one of: fp32, bf16"),
    ("a list for a choice", words("model.dtype=[fp32]"), r"model\.dtype.*choose one of"),
    ("an unknown part", words("layers.score=sensitivty"), r"did you mean 'sensitivity'"),
    ("an empty list of names", words("adapter.targets=[]"), r"list of names"),
    ("numbers for labels", words("task.verbalizer={1: a}"), r"1 as numbers.*quotes"),
    ("a NUL character", words(r'task.name="a\0b"'), r"task\.name.*NUL character"),
    ("half a character", words(r'task.template="\ud800"'), r"half a character"),
    ("a name out of data.root", words("task.name=../../etc"), r"task\.name is .*plain name"),
    ("an absolute name", words("task.name=/etc"), r"task\.name is .*plain name"),
    ("a name of 300 characters", words("output=" + "x" * 300), r"output.*longer than.*255 bytes"),
    ("a path of 5,000", words("data.root=" + "x/" * 2500), r"data\.root.*4095 for a path"),
    ("names that add up", words("task.name=" + "x" * 200, "output='{task}{task}'", "data.root=d"),
     r"run directory.*too long"),
    ("a plug-in of 300 characters", words("plugins=" + "x" * 300), r"plugins.*longer than"),
    ("a plug-in that is not there", words("plugins=mine.py"), r"plugins: mine\.py cannot be read"),
    ("a plug-in that fails", broken_plugin, r"mine\.py, line 2, cannot be used \(ZeroDivision"),
    ("a place that takes no folders", words("output=/proc/run"), r"cannot be made in /proc"),
    ("a run directory that exists", existing_output, r"exists already"),
    ("a run directory in a file", output_in_a_file, r"cannot be made in .*notes \(Not a directory"),
    ("another name in output", words("output='{task.foo}'"), r"only \{task\}, \{method\} and"),
    ("an attribute in output", words("output='{task.__class__}'"), r"only \{task\}, \{method\}"),
    ("more sampled than there are", words("federation.per_round=101"), r"no more can be sampled"),
    ("a mixture of nothing", words(preset="attempt"), r"run prompt-tuning on them, and give adap"),
    ("all rows in one client, in turns", words("federation.pooled=true", "curriculum.pace=linear"),
     r"makes one client of all.*curriculum\.pace=all"),
    ("nothing but warm-up", words("curriculum.warmup=30"), r"must leave a round for the method"),
    ("a rate that rises", words("local.lr_schedule=cosine", "local.lr=0.01", "local.lr_end=0.1"),
     r"local\.lr_end is 0\.1 and local\.lr 0\.01; a rate falls"),
    ("a rate that falls under variates", words(
        "local.lr_schedule=linear", "server.optimizer=momentum", "server.gradient=difference",
        "server.control=true",
    ), r"divides by local\.lr, so that it cannot change"),
    ("preferences with a prefix", words(
        "model.head=dpo", "adapter.kind=prefix", "data.partition.kind=iid"
    ),
     r"model\.head=dpo compares with the model whose adapter is off"),
    ("preferences and sensitivity", words(
        "model.head=dpo", "layers.score=sensitivity", "data.partition.kind=iid"
    ),
     r"model\.head=dpo passes two answers a row"),
    ("agreement without a warm-up", words(
        "layers.score=last", "layers.keep=lossless", "layers.rule=agreement"
    ), r"compares clients' updates of the last warm-up round, and curriculum\.warmup is 0"),
    ("agreement of one client", words(
        "layers.keep=lossless", "layers.rule=agreement", "federation.per_round=1",
        preset="fibecfed",
    ), r"agreement compares clients' updates with each other, and a round has one"),
    ("values at home averaged under masks", words(
        "layers.score=last", "layers.sync_every=2", "updates.transforms=hetlora"
    ), r"layers\.sync_every averages values that stay home, which updates\.transforms=hetlora"),
    ("curvature in bf16", words(
        "layers.keep=lossless", "model.dtype=bf16", "deepspeed=ds_configs/zero2.json",
        preset="fibecfed",
    ), r"layers\.keep=lossless by layers\.rule=eigengap needs model\.dtype=fp32"),
    ("preferences scored beforehand", words(
        "model.head=dpo", "curriculum.pace=linear", "curriculum.when=start",
        "data.partition.kind=iid",
    ), r"takes curriculum\.difficulty=fisher from training passes only"),
    ("ranks that make no slots", words("cluster.ranks_per_client=2"), r"1 MPI ranks do not divide"),
    ("words without a verbalizer", words(
        "model.head=label_words", "task.template='{a} <mask>'"
    ), r"brings none: set task\.verbalizer, as \{\w+: word"),
    ("no words at all", words("model.head=label_words"),
     r"set task\.template, as '\{a\} \. It was <mask>' and task\.verbalizer"),
]  # fmt: skip

WITHOUT_EFFECT: list[Case] = [
    ("the server's rate with a mean", words("server.lr=5"),
     r"server\.lr=5\.0 \(command line\) has no effect here: it counts if server\.optimizer is not"),
    ("a share of layers with all", words("layers.keep=0.1"), r"counts if layers\.score is not all"),
    ("sparsity without personal values", words("sparsity.keep=0.3"), r"counts if values are pers"),
    ("a late layer of other prompts", words("adapter.layer=2", preset="idpg"),
     r"adapter\.layer=2.*it counts if adapter\.kind is lpt"),
    ("answers of a classifier", words("evaluation.max_new_tokens=5"),
     r"max_new_tokens=5.*counts if model\.head is completion"),
    ("a reduction of LoRA", words("adapter.reduction=4"), r"adapter\.kind is bottleneck, idpg"),
    ("sources of other prompts", words("adapter.sources=[a]"), r"adapter\.kind is attempt"),
    ("short texts without a cut", words("curriculum.shortest=0.5"), r"curriculum\.cut is not none"),
    ("an end of nothing", words("curriculum.full_at=0.5"), r"pace is not all, or curriculum\.cut"),
    ("a start without a pace", words("curriculum.start=0.1"), r"counts if curriculum\.pace is not"),
    ("virtual tokens with LoRA", words("adapter.virtual_tokens=5"), r"kind is one of prefix"),
    ("a rank with prompts", words("adapter.rank=4", preset="p-tuning-v2"), r"adapter\.kind is lo"),
    ("more singular values than ranks", words("aggregation.budget=13", preset="adalora"),
     r"aggregation\.budget is 13 but adapter\.rank is 12"),
    ("a budget that falls before it begins", words("aggregation.prune_from=0.6", preset="adalora"),
     r"prune_from is 0\.6 but aggregation\.prune_to is 0\.5"),
    ("a budget without singular values", words("adapter.kind=lora", preset="adalora"),
     r"rule=budget .*needs adapter\.kind=adalora"),
    ("SLoRA without sparse values", words("adapter.sparse=0", preset="slora"),
     r"adapter\.sparse=0 cannot go with aggregation\.rule=slora"),
    ("SLoRA after a warm-up", words("curriculum.warmup=1", preset="slora"),
     r"curriculum\.warmup=1 cannot go with aggregation\.rule=slora"),
    ("SLoRA without a round for LoRA", words("federation.rounds=1", preset="slora"),
     r"federation\.rounds=1 cannot go with aggregation\.rule=slora"),
    ("sparse values without SLoRA", words("adapter.sparse=0.1"), r"aggregation\.rule is slora"),
    ("label skew with iid", words("data.partition.kind=iid", "data.partition.alpha=0.1"),
     r"counts if data\.partition\.kind is dirichlet"),
    ("in a file", file("layers: {rule: plateau}\n"), r"layers\.rule=plateau \(.*my\.yaml\) has no"),
    ("a template with a classifier", words("task.template='{a} <mask>'"), r"model\.head is cloze"),
    ("columns of the built-in task", words("data.columns.text=body"), r"data\.root names a folder"),
    ("a server where nothing is sent", words("server.optimizer=adam", preset="local-only"),
     r"server\.optimizer=adam.*sharing\.rule is not nothing"),
    ("values at home averaged, and none there", words("layers.sync_every=3"), r"values are pers"),
    ("values at home averaged after the end", words(
        "layers.sync_every=29", "federation.rounds=30", preset="fibecfed"
    ), r"layers\.sync_every=29.*leaves so many after curriculum\.warmup"),
    ("agreement without its rule", words(
        "layers.score=last", "layers.keep=lossless", "layers.agree=0.2"
    ), r"layers\.agree=0\.2.*counts if layers\.rule is agreement"),
    ("ranks of clients", words("updates.rank_decay=0.1"), r"updates\.transforms has hetlora"),
]  # fmt: skip

DEEPSPEED: list[Case] = [
    ("no such file", words("deepspeed=ds_configs/zero4.json"), r"does not exist; there are.*zero0"),
    ("a folder", folder_as_json, r"configs' is a folder; name a JSON file"),
    ("no JSON", deepspeed("{"), r"ds\.json, line 1: not valid JSON"),
    ("latin-1", deepspeed('{"é": 1}'.encode("latin-1")), r"not UTF-8 \(byte 2\)"),
    ("a key twice", deepspeed('{"bf16": {}, "bf16": {}}'), r"the key 'bf16' is given twice"),
    ("no number", deepspeed('{"gradient_predivide_factor": NaN}'), r"NaN is no number"),
    ("5,000 digits", deepspeed('{"steps_per_print": ' + "9" * 5000 + "}"), r"not valid JSON"),
    ("deep nesting", deepspeed("[" * 100_000), r"not valid JSON"),
    ("a list", deepspeed([]), r"must be a JSON object"),
    ("a section misspelt", deepspeed({"zero_optimisation": {"stage": 2}}),
     r"'zero_optimisation' has no place.*did you mean 'zero_optimization'"),
    ("a section that is a switch", deepspeed({"zero_optimization": True}), r"must be an object"),
    ("a key misspelt", deepspeed(zero(reduce_bucket_sise=5)),
     r"zero_optimization: DeepSpeed has no key 'reduce_bucket_sise'.*'reduce_bucket_size'"),
    ("a stage that is a switch", deepspeed(zero(True)), r"stage is True; choose one of: 0, 1, 2"),
    ("a stage that is a text", deepspeed(zero("2")), r"stage is '2'; choose one of"),
    ("a stage beyond all", deepspeed(zero(4)), r"stage is 4; choose one of"),
    ("a negative size", deepspeed(zero(reduce_bucket_size=-5)), r"is -5; it must be above 0"),
    ("a size that is a text", deepspeed(zero(allgather_bucket_size="5e8")), r"a whole number, not"),
    ("half a size", deepspeed(zero(reduce_bucket_size=0.5)), r"a whole number, not 0\.5"),
    ("a switch that is a number", deepspeed(zero(overlap_comm=1)), r"must be true or false, not 1"),
    ("auto", deepspeed(zero(reduce_bucket_size="auto")), r"only Hugging Face's Trainer fills in"),
    ("parameters offloaded at stage 1", deepspeed(zero(1, offload_param={"device": "cpu"})),
     r"offload_param has no effect at ZeRO stage 1"),
    ("an optimizer offloaded at stage 0", deepspeed(zero(0, offload_optimizer={"device": "cpu"})),
     r"offload_optimizer has no effect at ZeRO stage 0"),
    ("a key of stage 3", deepspeed(zero(stage3_max_live_parameters=5)), r"at ZeRO stage 2, but at"),
    ("offload as a text", deepspeed(zero(3, offload_param="cpu")), r"must be an object"),
    ("an unknown device", deepspeed(zero(3, offload_param={"device": "gpu"})),
     r"offload_param\.device is 'gpu'; choose one of: none, cpu, nvme"),
    ("offload to a disk", deepspeed(zero(3, offload_param={"device": "nvme"})), r"not supported"),
    ("part of an optimizer", deepspeed(zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5})),
     r"partial optimizer offload"),
    ("a name of the past", deepspeed(zero(cpu_offload=True)), r"name of the past; use offload_opt"),
    ("quantized weights", deepspeed(zero(3, zero_quantized_weights=True)), r"another precision"),
    ("fp16", deepspeed({"fp16": {"enabled": True}}), r"enables fp16.*use model\.dtype=bf16"),
    ("fp16 is auto", deepspeed({"fp16": {"enabled": "auto"}}), r"fp16\.enabled is 'auto'"),
    ("fp16 is a list", deepspeed({"fp16": []}), r"fp16 must be an object"),
    ("bf16 is a switch", deepspeed({"bf16": True}), r"bf16 must be an object"),
    ("bf16 against the configuration", deepspeed({"bf16": {"enabled": True}, **zero()}),
     r"enables bf16 but model\.dtype is fp32"),
    ("no bf16 against the configuration", deepspeed(
        {"bf16": {"enabled": False}, **zero()}, "model.dtype=bf16"
    ), r"disables bf16 but model\.dtype is bf16"),
    ("masters in bf16", deepspeed(
        {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, **zero()},
        "model.dtype=bf16",
    ), r"master values and moments are fp32"),
    ("bf16 at stage 0", words("model.dtype=bf16"), r"model\.dtype=bf16 needs ZeRO stage 1, 2 or 3"),
    ("the old name of bf16", deepspeed({"bfloat16": {"enabled": True}}), r"bfloat16, which mod"),
    ("autocast", deepspeed({"torch_autocast": {"enabled": True}}), r"torch_autocast, which mo"),
    ("amp", deepspeed({"amp": {"enabled": True}}), r"amp, which model\.dtype rules"),
    ("gradients in bf16", deepspeed({"data_types": {"grad_accum_dtype": "bf16"}, **zero()}),
     r"gradients up in bf16"),
    ("communication in fp16", deepspeed({"communication_data_type": "fp16"}), r"fp32, bf16"),
    ("a batch size", deepspeed({"train_batch_size": 8}), r"which local\.batch_size rules"),
    ("an optimizer", deepspeed({"optimizer": {"type": "Adam"}}), r"which local\.optimizer rules"),
    ("checkpointing", deepspeed({"activation_checkpointing": {"number_checkpoints": 2}}),
     r"which model\.gradient_checkpointing rules"),
    ("a pipeline", deepspeed({"pipeline": {"stages": 2}}), r"'pipeline' has no place"),
]  # fmt: skip

PRIVACY: list[Case] = [
    (name, words("privacy.noise=1.0", *given), said + ".* cannot go with privacy: ")
    for name, given, said in (
        ("rounds that are drawn again", ["federation.min_clients=2"], r"federation\.min_clients"),
        ("SCAFFOLD", ["local.control=true"], r"local\.control"),
        (
            "control variates of the server",
            ["server.optimizer=momentum", "server.control=true"],
            r"server\.control",
        ),
        ("scores of layers", ["layers.score=sensitivity"], r"layers\.score=sensitivity"),
        (
            "a number of layers from data",
            ["layers.score=last", "layers.keep=lossless"],
            r"layers\.keep=lossless",
        ),
        (
            "values that stay home",
            ["layers.score=last", "layers.sync_every=2"],
            r"layers\.sync_every",
        ),
        (
            "clients' updates compared",
            ["layers.score=last", "layers.keep=lossless", "layers.rule=agreement"],
            r"layers\.keep=lossless",
        ),
        ("weights by norm", ["updates.transforms=hetlora"], r"updates\.transforms=\['hetlora'\]"),
        ("nothing that is sent", ["sharing.rule=nothing"], r"sharing\.rule=nothing"),
        ("clients' own factors", ["aggregation.rule=flexlora"], r"aggregation\.rule=flexlora"),
        ("one client of all", ["federation.pooled=true"], r"federation\.pooled"),
        ("sums that are not exact", ["collective.wire=float32"], r"collective\.wire=float32"),
    )
]
QUANTIZED = [
    (
        "4 bits beside virtual tokens",
        words("model.quantize=nf4", "adapter.kind=prefix"),
        r"model\.quantize=nf4 goes with adapter\.kind=lora, not prefix",
    ),
    (
        "4 bits with ZeRO-3",
        words("model.quantize=nf4", "deepspeed=ds_configs/zero3.json"),
        r"ZeRO-3 cannot share out weights that are packed",
    ),
    (
        "flash attention in 32 bits",
        words("model.attention=flash_attention_2"),
        r"flash_attention_2 computes in 16 bits only; use model\.dtype=bf16",
    ),
]
PRIVACY += [
    (name, words("privacy.noise=1.0", "privacy.unit=sample", *given),
     "privacy.unit=sample with " + said + ".* cannot go with privacy: ")
    for name, given, said in (
        ("rows chosen by difficulty", ["curriculum.pace=linear"], r"curriculum\.pace=linear"),
        (
            "neurons chosen by gradients of rows",
            ["layers.score=last", "sparsity.keep=0.5"],
            r"sparsity\.keep=0\.5",
        ),
        ("a median of rows", ["privacy.clip=adaptive"], r"privacy\.clip=adaptive"),
        (
            "norms of rows in bf16",
            ["model.dtype=bf16", "deepspeed=ds_configs/zero1.json"],
            r"model\.dtype=bf16",
        ),
        (
            "rows of prompts", ["adapter.kind=prefix"], r"adapter\.kind=prefix",
        ),
        (
            "phases of rows", ["sharing.rule=fedalt", "layers.score=last"], r"sharing\.rule=fedalt",
        ),
    )
]  # fmt: skip

PRIVACY += [
    (
        "a delta of one in so many clients",
        words("privacy.noise=1", "privacy.delta=0.01"),
        r"delta is 0\.01, and there are 100 clients",
    ),
    ("a norm without noise", words("privacy.clip=2.0"), r"counts if privacy\.epsilon or privacy\."),
    ("a norm by another word", words("privacy.noise=1", "privacy.clip=median"), r"privacy\.clip"),
    (
        "no noise",
        words("privacy.noise=0"),
        r"privacy\.noise.*out of range: it must be at least 0\.1",
    ),
]

CASES: list[Case] = [
    (f"{area}: {what}", build, said)
    for area, cases in (
        ("YAML file", YAML), ("override", OVERRIDES), ("value", OPTIONS),
        ("option without effect", WITHOUT_EFFECT), ("DeepSpeed JSON", DEEPSPEED),
        ("backbone", QUANTIZED), ("privacy", PRIVACY),
    )
    for what, build, said in cases
]  # fmt: skip
