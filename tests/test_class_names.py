"""Names of classes: the files that hold them, the heads that they fit, and the images that are explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.relevance.choice import choose_classes, find_targets
from train.checkpoint import save_checkpoint
from train.data.classes import HeadClasses, check_shared_names, named_classes, read_class_names
from train.errors import DamagedFileError, InputError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "cat\r\n big dog \nfox", ("cat", "big dog", "fox")),
        ("b.txt", "\ufeffcat\ndog\n", ("cat", "dog")),
        ("c.json", '["dog", "cat"]', ("dog", "cat")),
        ("d.json", '{"cat": 1, "dog": 0}', ("dog", "cat")),
        ("e.txt", "cat\n\ndog\n", "class 2 has no name"),
        ("f.txt", "", "holds no list of class names"),
        ("g.txt", "cat\ndog\ncat\n", "names the class 'cat' 2 times"),
        ("h.json", '{"cat": 0, "dog": 0}', "does not give each name one index from 0 to 1"),
        ("i.json", '{"1": "cat", "0": "dog"}', ("dog", "cat")),
        ("n.txt", "cat\ndog\n\n \n", ("cat", "dog")),
        ("o.json", json.dumps({"id2label": {str(i): f"c{i}" for i in range(11)}}), tuple(f"c{i}" for i in range(11))),
        ("p.json", '{"architecture": "vit", "label_names": ["cat", "dog"]}', ("cat", "dog")),
        ("q.json", '{"1": "cat", "2": "dog"}', "does not give each name one index from 0 to 1"),
        ("r.json", '{"0": 0, "1": 1}', ("0", "1")),
        ("s.json", '{"0": "cat", "00": "dog"}', "does not give each name one index from 0 to 1"),
        ("t.json", "{}", "holds no list of class names"),
        ("u.json", '{"id2label": null}', "holds no list of class names"),
        ("j.json", '["cat", 7]', "holds no list of class names"),
        ("k.json", "[" * 100_000, "is not JSON"),
        ("l.txt", b"caf\xe9\n", "cannot be read as UTF-8 text"),
        ("m.txt", None, "does not exist"),
    ],
)
def test_files_of_class_names(name: str, content: str | bytes | None, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, tuple):
        assert read_class_names(path) == expected
        return
    with pytest.raises(InputError, match=expected):
        read_class_names(path)


def test_names_must_be_those_of_the_head(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    file = str(tmp_path / "names.txt")
    found = named_classes(2, condition="a", checkpoint=None, file=file)
    assert found == HeadClasses(2, ("cat", "dog"), "named by names.txt")
    np.testing.assert_array_equal(found.outputs_of(np.array([2, 0, 1]), ("cat", "cow", "dog")), [1, 0, -1])
    for outputs, head in ((3, "a head of 3 outputs"), (0, "no head")):
        with pytest.raises(InputError, match=f"holds 2 class names, and condition a has {head}"):
            named_classes(outputs, condition="a", checkpoint=None, file=file)
    with pytest.raises(InputError, match=r"none of the class names of .* is a class of the data set"):
        check_shared_names(found, ("Cat", "Dog"), file)
    check_shared_names(found, ("Cat", "dog"), file)
    path = tmp_path / "a.safetensors"
    for names, reason in ((["cat"], "names 1 classes"), (["cat", "cat"], "2 times"), ("cat", "no list")):
        save_checkpoint(path, {"x": torch.zeros(1)}, {"class_names": names})
        with pytest.raises(DamagedFileError, match=reason):
            named_classes(2, condition="a", checkpoint=path, file="")
    save_checkpoint(path, {"x": torch.zeros(1)}, {})
    unnamed = named_classes(2, condition="a", checkpoint=path, file="")
    assert unnamed is not None, "the start of our own training: its head stands for nothing"
    assert not unnamed.known


class Images:
    """Labels alone."""

    def __init__(self, labels: list[int], class_names: tuple[str, ...]) -> None:
        self.labels, self.class_names = np.array(labels), class_names

    def __len__(self) -> int:
        return len(self.labels)


def chosen(heads: dict[str, HeadClasses], images: Any, predicted: dict[str, list[int]] | None = None) -> Any:
    choice = choose_classes(heads, images, "baseline")
    targets = find_targets(
        choice,
        heads,
        images,
        choice.rows,
        0,
        against="baseline",
        predict=lambda name: np.array((predicted or {})[name]),
    )
    return choice, targets


def test_what_maps_are_of() -> None:
    images = Images([0, 1, 2, 2], ("bar", "kitchen", "office"))
    many = HeadClasses(4, ("zoo", "office", "attic", "kitchen"), "named")
    few = HeadClasses(3, ("kitchen", "bar", "office"), "named")
    choice, targets = chosen({"baseline": many, "finetuned": few}, images)
    assert (choice.role, choice.rows, set(choice.shared)) == ("true", (1, 2, 3), {"office", "kitchen"})
    assert "1 of 4 images are of a class that not every head has" in choice.left_out[0]
    assert targets["baseline"].target.tolist() == [3, 1, 1]
    assert targets["finetuned"].target.tolist() == [0, 2, 2]
    assert targets["baseline"].other is not None
    assert targets["baseline"].other.tolist() == [1, 3, 3]
    assert targets["finetuned"].other is not None
    assert targets["finetuned"].other.tolist() == [2, 0, 0]

    animals, turned = HeadClasses(2, ("cat", "dog"), "named"), HeadClasses(2, ("dog", "cat"), "named")
    choice, targets = chosen({"baseline": animals, "finetuned": turned}, images, {"baseline": [0, 0, 1, 0]})
    assert (choice.role, choice.same_class) == ("predicted", True)
    assert targets["finetuned"].target.tolist() == [1, 1, 0, 1], "the class that the baseline predicts, by name"

    predicted = {"baseline": [0, 0, 1, 0], "finetuned": [2, 2, 2, 0]}
    for other in (few, HeadClasses(3, (), "not known"), HeadClasses(2, (), "not known")):
        choice, targets = chosen({"baseline": animals, "finetuned": other}, images, predicted)
        assert (choice.role, choice.same_class) == ("own", False)
        assert {name: target.target.tolist() for name, target in targets.items()} == predicted
        assert targets["baseline"].other is None
    choice, targets = chosen({"baseline": HeadClasses(0), "finetuned": few}, images)
    assert choice.role == "true"
    assert list(targets) == ["finetuned"]
    choice, targets = chosen({"baseline": HeadClasses(0)}, images)
    assert not choice.rows
    assert not targets


def test_a_class_that_a_file_of_names_spells_otherwise_is_said(caplog: pytest.LogCaptureFixture) -> None:
    head = HeadClasses(3, ("kitchen", "baht", "living"), "named by names.txt")
    with caplog.at_level("INFO", logger="train"):
        check_shared_names(head, ("bath", "kitchen", "living"), "misspelt.txt")
    assert caplog.messages == ["class 'bath' of the data set is not in misspelt.txt; did you mean baht?"]
