"""Which class each output of a model's head stands for: names in the order of the outputs, or why they are not known.

A class is a name and not an index: heads that were trained elsewhere have other sizes, other orders and other classes,
and the same index means another class in each. Whatever compares a label with an output goes through `HeadClasses`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.checkpoint import has_sidecar, read_metadata, sidecar_path
from train.errors import DamagedFileError, InputError, nearest
from train.files import require_file
from train.weight_files import say_once

_FORMS = (
    "expected one class name per line, a JSON list of names, JSON of name → index or of index → name, or a model's "
    "config.json, in the order of the outputs"
)


@dataclass(frozen=True)
class HeadClasses:
    """The classes of one head."""

    outputs: int  # 0 without a head, when what the model puts out is features and no classes
    names: tuple[str, ...] = ()  # the class name of each output; empty where they are not known
    # Where the names come from, or why they are not known, as part of a sentence; "": trained here on the data set.
    source: str = ""

    @property
    def known(self) -> bool:
        return bool(self.names)

    def name(self, output: int) -> str:
        """What an output is called in a caption: its class, or its number where classes are not known."""
        return self.names[output] if self.known else f"number {output}"

    def outputs_of(self, labels: Sequence[int] | NDArray[np.int64], class_names: Sequence[str]) -> NDArray[np.int64]:
        """The output that stands for each label of the data set's, [image]; −1 where the head has no such class."""
        place = {name: output for output, name in enumerate(self.names)}
        of_class: NDArray[np.int64] = np.array([place.get(name, -1) for name in class_names], dtype=np.int64)
        return np.asarray(of_class[np.asarray(labels)])

    def origin(self, whose: str) -> str:
        """What is known of the head, in a sentence; "" for one that was trained here."""
        if not self.outputs:
            return f"{whose} has no head: what it puts out are features and no classes."
        if not self.known:
            return f"The classes of {whose}'s head are not known: {self.source}."
        return f"The classes of {whose}'s head are {self.source}." if self.source else ""

    def consequences(self, images: int, without: int) -> str:
        """What is left out of measuring `images`, `without` of which are of no class of the head; "" for nothing."""
        link = "the correlation of attention with the prediction"
        if not self.known:
            maps = "relevance by true and by other class" if self.outputs else "relevance maps"
            return f"Left out for it: accuracy, the prediction beside sample maps, {maps}, and {link}."
        if not without:
            return ""
        return (
            f"{without:,} of {images:,} images are of a class that it does not have, and are left out of its accuracy, "
            f"of relevance by true class, and of {link}."
        )


def named_classes(outputs: int, *, condition: str, checkpoint: Path | None, file: str) -> HeadClasses | None:
    """The classes of a head that has none, or that `file` or the checkpoint's own sidecar names; None where none does.

    `condition` is whose head it is, for the messages; "" for a model alone. Raises InputError for a file that is not
    class names, or of another number than the head has outputs; DamagedFileError for such a sidecar.
    """
    owner = f"condition {condition}" if condition else "the model"
    if file:
        names = read_class_names(Path(file))
        if len(names) != outputs:
            head = f"a head of {outputs} outputs; name each output once" if outputs else "no head; leave the file out"
            raise InputError(f"{file} holds {len(names)} class name{'s'[: len(names) != 1]}, and {owner} has {head}")
        return HeadClasses(outputs, names, f"named by {Path(file).name}")
    if not outputs:
        return HeadClasses(0)
    if checkpoint is None or not has_sidecar(checkpoint):
        return None
    sidecar = sidecar_path(checkpoint)
    recorded = read_metadata(checkpoint).get("class_names")
    if recorded is None:
        return HeadClasses(outputs, (), f"its sidecar {sidecar.name} names none")
    try:
        names = _checked(recorded, str(sidecar))
    except InputError as error:
        raise DamagedFileError(f"{error}; train the checkpoint again") from error
    if len(names) != outputs:
        raise DamagedFileError(
            f"{sidecar} names {len(names)} classes, and its checkpoint has {outputs} outputs; train it again"
        )
    return HeadClasses(outputs, names, f"named by its sidecar {sidecar.name}")


def check_shared_names(head: HeadClasses, class_names: Sequence[str], file: str) -> None:
    """Refuse names that a user gave to a head of the data set's size and of which none is a class of the data set.

    Where some are, the log names the first class that is not among them, for it may be a slip of the pen.
    """
    missing = sorted(set(class_names) - set(head.names)) if file else []
    if missing and len(missing) < len(class_names):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        say_once(f"class {missing[0]!r}{more} of the data set is not in {file}{nearest(missing[0], head.names)}")
    if file and head.outputs == len(class_names) and not set(head.names) & set(class_names):
        raise InputError(
            f"none of the class names of {file} is a class of the data set (it begins with {head.names[0]!r}; the "
            f"class folders with {class_names[0]!r}); give the names as the folders have them"
        )


def folder_classes(outputs: int, class_names: Sequence[str], order: str, key: str) -> HeadClasses:
    """The classes of a head that nothing names: the class folders in their order, where there is just one reading.

    timm's folder reader has 1, 2, …, 10; torchvision's, as this program, has 1, 10, 2. Where the two are one order, or
    `order` ("auto", "string" or "natural") says which it is, a head of as many outputs is taken to be of the folders in
    that order. `class_names` are in the order of strings; `key` is that of a file of class names, for the messages.
    """
    string, natural = tuple(class_names), _natural_order(class_names)
    unknown = ""
    if outputs != len(class_names):
        unknown = (
            f"it has {outputs:,} outputs, the data set {len(class_names):,} classes, and nothing names them (--{key} "
            "FILE does)"
        )
    elif not natural and order != "string":
        unknown = (
            "timm's natural order of the class folders is not defined, as two names are the same in it or one cannot "
            f"be read, and nothing says that it was not used (--data.class_order string does, or names by --{key} FILE)"
        )
    elif order == "auto" and string != natural:
        at = next(i for i, pair in enumerate(zip(string, natural, strict=True)) if pair[0] != pair[1])
        unknown = (
            f"of the class folders, class {at + 1} is {string[at]!r} in the order of strings and {natural[at]!r} in "
            "timm's natural order, and in which of the two the head was trained is not said (say it with "
            f"--data.class_order string or --data.class_order natural, or name the classes with --{key} FILE)"
        )
    if unknown:
        return HeadClasses(outputs, (), unknown)
    how = f"in {order} order, as data.class_order says" if order != "auto" else "in the order of their names"
    names = natural if order == "natural" else string
    return HeadClasses(outputs, names, f"assumed to be the class folders {how}")


def _natural_order(class_names: Sequence[str]) -> tuple[str, ...]:
    """The order of timm's own folder reader; () where it has none: of "1" and "01", "Bar" and "bar", or with "1²"."""
    from timm.utils.misc import natural_key

    try:
        keys = {tuple(natural_key(name)): name for name in class_names}
    except ValueError:
        return ()
    return tuple(keys[key] for key in sorted(keys)) if len(keys) == len(class_names) else ()


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of a file, in the order of a head's outputs; InputError where it holds no such names."""
    require_file(path, "file of class names", _FORMS)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"file of class names {path} cannot be read as UTF-8 text ({error}); {_FORMS}") from error
    if path.suffix.lower() != ".json":
        return _checked([line.strip() for line in text.rstrip().splitlines()], str(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"file of class names {path} is not JSON ({error}); {_FORMS}") from error
    if isinstance(content, dict):  # a config.json of Hugging Face's models, or of timm's
        content = content.get("id2label", content.get("label_names", content))
    return _checked(_in_order(content, path) if isinstance(content, dict) else content, str(path))


def _in_order(table: dict[str, Any], path: Path) -> list[Any]:
    """The names of a table of name → index, or of index → name, in the order of the indices."""
    if all(isinstance(name, str) and index.isdecimal() and len(index) < 10 for index, name in table.items()):
        pairs = [(int(index), name) for index, name in table.items()]
    else:
        pairs = [(index, name) for name, index in table.items() if type(index) is int]
    if len(pairs) < len(table) or sorted(index for index, _ in pairs) != list(range(len(pairs))):
        raise InputError(
            f"file of class names {path} does not give each name one index from 0 to {len(table) - 1}; {_FORMS}"
        )
    return [name for _, name in sorted(pairs)]


def _checked(names: Any, origin: str) -> tuple[str, ...]:
    """Names as they are, if they can be those of a head's outputs."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{origin} holds no list of class names; {_FORMS}")
    empty = next((number for number, name in enumerate(names, start=1) if not name), None)
    if empty is not None:
        raise InputError(f"{origin}: class {empty} has no name; {_FORMS}")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise InputError(f"{origin} names the class {name!r} {times} times; {_FORMS}")
    return tuple(names)
