"""Which file is a client's current one, and which files are dropped."""

from copy import deepcopy

import torch

from hpcfed.state import ClientFiles
from hpcfed.storage.run import RunDirectory
from hpcfed.storage.states import ClientStates


def files(path):
    return sorted(p.name for p in path.glob("clients/*/*"))


def loaded(states, client, at=None):
    found = states.load(client, at)
    assert found is not None
    return found


def test_current_pinned_and_dropped(tmp_path):
    """A file outlives two commits that do not refer to it: the one before must be whole too."""
    states = ClientStates("personal", ClientFiles(), RunDirectory(tmp_path), writes=True)

    def round_of(number, client):
        states.save(client, number, {"values": torch.full((2,), float(number))})
        states.accept(number, [client])
        states.sweep()

    assert states.load(7) is None
    round_of(0, 7)
    round_of(1, 7)
    assert files(tmp_path) == ["personal-00000.safetensors", "personal-00001.safetensors"]
    states.pin()
    best = states.files.pinned
    states.sweep()
    assert files(tmp_path) == ["personal-00001.safetensors"], "the old file is dropped"
    round_of(2, 7)
    round_of(4, 7)
    states.sweep()
    assert files(tmp_path) == ["personal-00001.safetensors", "personal-00004.safetensors"]
    assert loaded(states, 7)["values"].tolist() == [4, 4]
    assert loaded(states, 7, best)["values"].tolist() == [1, 1], "the best round's values are kept"
    states.pin()
    states.sweep()
    assert len(files(tmp_path)) == 2, "nothing is deleted before the commit after the next"
    states.sweep()
    assert files(tmp_path) == ["personal-00004.safetensors"], "until another round is the best"


def test_what_only_the_commit_before_refers_to_is_known_to_the_next_life(tmp_path):
    directory = RunDirectory(tmp_path)
    states = ClientStates("personal", ClientFiles(), directory, writes=True)
    for number in (0, 1):
        states.save(7, number, {"values": torch.zeros(2)})
        states.accept(number, [7])
        committed = deepcopy(states.files)  # as a commit would write it
        states.sweep()
    assert committed.replaced == {(7, 0)}
    later = ClientStates("personal", committed, directory, writes=True)
    assert len(files(tmp_path)) == 2
    later.sweep()
    assert files(tmp_path) == ["personal-00001.safetensors"]


def test_a_failed_round_leaves_the_old_state(tmp_path):
    states = ClientStates("curriculum", ClientFiles(), RunDirectory(tmp_path), writes=True)
    states.save(3, 0, {"difficulty": torch.zeros(1)})
    states.accept(0, [3])
    states.save(3, 1, {"difficulty": torch.ones(1)})  # and then its update was refused
    assert loaded(states, 3)["difficulty"].item() == 0


def test_only_the_writer_deletes(tmp_path):
    writer, reader = (
        ClientStates("personal", ClientFiles(), RunDirectory(tmp_path), writes)
        for writes in (True, False)
    )
    for number in (0, 1):
        writer.save(1, number, {"values": torch.zeros(1)})
    for states, left in ((reader, 2), (writer, 1)):
        states.accept(0, [1])
        states.accept(1, [1])
        states.sweep()
        states.sweep()
        assert len(files(tmp_path)) == left
    assert reader.files == writer.files
