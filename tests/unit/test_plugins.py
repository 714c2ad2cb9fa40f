"""Plug-ins and presets of one's own: what they register, where they lie, and their faults."""

import re

import pytest

import hpcfed
from hpcfed import registry
from hpcfed.errors import UserError
from hpcfed.settings import plugins
from hpcfed.settings.resolve import resolve
from tests import documented

# The reference of the page: its files, and what each registers.
REFERENCE = {
    "my_turns.py": (registry.SHARING, "turns"),
    "my_noise.py": (registry.UPDATES, "noise"),
    "my_lion.py": (registry.SERVERS, "lion"),
    "my_words.py": (registry.DIFFICULTIES, "distinct"),
    "my_score.py": (registry.SCORES, "gradient"),
    "my_objective.py": (registry.OBJECTIVES, "smoothed"),
    "my_adapter.py": (registry.ADAPTERS, "bitfit"),
}
RULE = """import hpcfed

@hpcfed.register.sharing("{name}", "a rule of a test")
def rule(layout, round_number, chosen):
    return {result!r}
"""


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    plugins.load([])
    assert "mine" not in registry.SHARING and "turns" not in registry.SHARING


@pytest.fixture
def rule(tmp_path):
    """rule(path, name, result): a plug-in whose rule returns the result."""

    def write(path, name="mine", result="a"):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(RULE.format(name=name, result=result))
        return str(file)

    return write


@pytest.fixture
def preset(tmp_path):
    """preset(path, text): a YAML file."""

    def write(path, text):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return str(file)

    return write


def answer(name="mine"):
    return registry.SHARING[name](None, 0, None)


def refused(source, *words):
    with pytest.raises(UserError) as caught:
        resolve(source, words)
    return str(caught.value)


# What the page shows.


def test_every_file_of_the_reference_registers(tmp_path):
    documented.write(tmp_path)
    shown = {name for name in documented.files() if name.endswith(".py")}
    assert shown == {*REFERENCE, "my_method.py", "try_it.py"}
    plugins.load([str(tmp_path / name) for name in REFERENCE])
    for kind, name in REFERENCE.values():
        assert kind[name] is not None and len(kind.help(name)) > 10
    sections = set(re.findall(r"^### (\w+)$", documented.PAGE.read_text(), re.MULTILINE))
    kinds = {n for n, own in vars(registry.Register).items() if isinstance(own, registry.Registry)}
    assert sections == kinds
    described = {getattr(hpcfed.register, name).kind for name in sections}
    assert described == {kind.kind for kind, _ in REFERENCE.values()}


def test_the_preset_of_the_page(tmp_path):
    documented.write(tmp_path)
    resolved = resolve(str(tmp_path / "mine.yaml"))
    config = resolved.config
    assert config.plugins == (str(tmp_path / "my_method.py"),)
    assert (config.sharing.rule, config.updates.transforms) == ("only-a", ("clip-and-keep",))
    assert config.adapter.kind == "lora" and config.layers.score == "all"
    assert resolved.origin["sharing.rule"].startswith("preset ")
    assert resolved.origin["layers.score"] == "preset lora-fedavg"


# Presets of one's own.


def test_presets_build_on_each_other(preset):
    preset("first.yaml", "base: fedprox\nlocal: {epochs: 3, lr: 0.1}\n")
    preset("sub/second.yaml", "base: ../first.yaml\nlocal: {lr: 0.2}\n")
    last = preset("last.yaml", "base: sub/second.yaml\nseed: 7\n")
    config = resolve(last, ["local.batch_size=4"]).config
    assert (config.local.proximal, config.local.epochs, config.local.lr) == (0.01, 3, 0.2)
    assert (config.seed, config.local.batch_size) == (7, 4)
    assert config.method == last


def test_a_method_beside_the_file_that_names_it(preset, tmp_path, monkeypatch):
    mine = preset("sub/mine.yaml", "base: lora-fedavg\nlocal: {lr: 0.2, epochs: 5}\n")
    source = preset("sub/run.yaml", "method: mine.yaml\nlocal: {epochs: 3}\n")
    config = resolve(source).config
    assert (config.method, config.local.lr, config.local.epochs) == (mine, 0.2, 3)
    # On the command line a file is looked for where the process runs.
    monkeypatch.chdir(tmp_path / "sub")
    config = resolve("demo", ["method=mine.yaml"]).config
    assert (config.method, config.local.lr, config.federation.clients) == ("mine.yaml", 0.2, 24)
    assert resolve("run.yaml").config.method == "mine.yaml"
    # A preset of ours goes before a file of that name.
    preset("sub/other.yaml", "base: fedprox\n")
    preset("sub/fedprox", "local: {proximal: 1}\n")
    assert resolve("other.yaml").config.local.proximal == 0.01


def test_another_method_than_a_presets_own(preset):
    mine = preset("mine.yaml", "base: fedprox\nseed: 7\n")
    config = resolve(mine, ["method=lora-fedavg"]).config
    assert (config.method, config.seed, config.local.proximal) == ("lora-fedavg", 7, 0)


@pytest.mark.parametrize("name", ["mine.yaml", "sub/../mine.yaml", "sub/other.yaml"])
def test_a_preset_that_builds_on_itself(preset, name):
    preset("sub/other.yaml", "base: ../mine.yaml\n")
    mine = preset("mine.yaml", f"base: {name}\n")
    assert "builds on itself" in refused(mine)


def test_an_unknown_base(preset):
    said = refused(preset("mine.yaml", "base: fedproxx\n"))
    assert "'fedproxx'" in said and "did you mean 'fedprox'" in said
    assert "'nowhere.yaml'" in refused(preset("mine.yaml", "base: nowhere.yaml\n"))
    assert "Unknown preset 3" in refused(preset("mine.yaml", "base: 3\n"))
    said = refused(preset("mine.yaml", "base: lora-fedavg\nlocl: {lr: 1}\n"))
    assert "'locl'" in said and "did you mean 'local'" in said


# Where plug-ins lie, and how long they hold.


@pytest.mark.parametrize("form", ["[rule.py]", "rule.py"])
def test_plugins_lie_beside_the_file_that_names_them(rule, preset, tmp_path, monkeypatch, form):
    file = rule("sub/rule.py")
    mine = preset("sub/mine.yaml", f"base: lora-fedavg\nplugins: {form}\nsharing: {{rule: mine}}\n")
    config = resolve(mine).config
    assert config.plugins == (file,) and config.sharing.rule == "mine"
    monkeypatch.chdir(tmp_path / "sub")
    assert resolve("mine.yaml").config.plugins == ("rule.py",)
    assert (
        resolve("fedprox", [f"plugins={form}", "sharing.rule=mine"]).config.local.proximal == 0.01
    )
    # The one beside the file wins over one where the process runs.
    rule("rule.py", result="elsewhere")
    monkeypatch.chdir(tmp_path)
    resolve(mine)
    assert answer() == "a"


def test_a_plugin_is_read_again_when_it_has_changed(rule, tmp_path):
    file = rule("rule.py")
    counter = tmp_path / "reads"
    with open(file, "a") as stream:
        stream.write(f"\nwith open({str(counter)!r}, 'a') as stream:\n    stream.write('x')\n")
    for _ in range(2):
        resolve("lora-fedavg", [f"plugins=[{file}]", "sharing.rule=mine"])
    assert counter.read_text() == "x" and answer() == "a"
    rule("rule.py", name="other", result="b")
    resolve("lora-fedavg", [f"plugins=[{file}]", "sharing.rule=other"])
    assert answer("other") == "b" and "mine" not in registry.SHARING
    before, after = plugins.digests([file]), rule("rule.py")
    assert plugins.digests([after]).keys() == before.keys()
    assert plugins.digests([after]) != before


def test_a_plugin_holds_for_the_configuration_that_names_it(rule, preset):
    """Two runs of one process may have plug-ins of one name, and parts of one name."""
    for folder in ("one", "two"):
        rule(f"{folder}/rule.py", result=folder)
        preset(
            f"{folder}/mine.yaml", "base: lora-fedavg\nplugins: [rule.py]\nsharing: {rule: mine}"
        )
    for folder in ("one", "two", "one"):
        resolve(preset(f"{folder}/run.yaml", "method: mine.yaml\n"))
        assert answer() == folder
    assert "'mine'" in refused("lora-fedavg", "sharing.rule=mine")


# Faults.


def test_plugins_that_cannot_be_read(tmp_path):
    for path, words in (
        (tmp_path / "nowhere.py", "nowhere.py cannot be read (No such file"),
        (tmp_path, "cannot be read (Is a directory)"),
        (tmp_path / "rule.txt", "rule.txt is no Python file"),
    ):
        (tmp_path / "rule.txt").write_text("x = 1\n")
        assert words in refused("lora-fedavg", f"plugins=[{path}]")
    assert "must be a list of names" in refused("lora-fedavg", "plugins=[3]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\ndef f(:\n", "rule.py, line 2, cannot be used (SyntaxError: invalid syntax)."),
        ("x = 1\n\ny = x / 0\n", "rule.py, line 3, cannot be used (ZeroDivisionError: division"),
        ("import nosuchmodule\n", "rule.py, line 1, cannot be used (ModuleNotFoundError: No mod"),
    ],
)
def test_plugins_that_python_cannot_run(tmp_path, monkeypatch, text, words):
    file = tmp_path / "rule.py"
    file.write_text(text)
    assert words in refused("lora-fedavg", f"plugins=[{file}]")
    monkeypatch.chdir(tmp_path)
    assert f"plugins: {words}" in refused("lora-fedavg", "plugins=[rule.py]")
    file.write_text("x = 1\n")
    resolve("lora-fedavg", [f"plugins=[{file}]"])


def test_names_that_are_taken(rule):
    ours = rule("ours.py", name="fedsa")
    said = refused("lora-fedavg", f"plugins=[{ours}]")
    assert "ours.py, line 3, cannot be used" in said
    assert "there is a sharing rule 'fedsa' already, in hpcfed" in said
    # Of two plug-ins, also of the same name.
    first, second = rule("one/rule.py"), rule("two/rule.py")
    said = refused("lora-fedavg", f"plugins=[{first}, {second}]")
    assert f"{second}, line 3," in said and f"'mine' already, in {first}" in said
    resolve("lora-fedavg", [f"plugins=[{first}, {first}]"])


def test_an_unknown_name_lists_those_of_plugins_too(rule):
    said = refused("lora-fedavg", f"plugins=[{rule('rule.py')}]", "sharing.rule=mime")
    assert "did you mean 'mine'" in said and said.endswith("nothing, mine.")
    assert "'only-a'" in refused("lora-fedavg", "sharing.rule=only-a")
