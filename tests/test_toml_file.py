"""A study.toml as people bring it: read, or named for what it is, with the line and what to write instead."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.config import load_study
from engine.config.toml_file import read_toml
from train.errors import InputError


def sentence(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_study(path, {})
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize(
    "content",
    [
        '[train]\nepochs = 3\n[data]\nroot = "Café"\n'.encode("utf-8-sig"),
        b"[train]\r\nepochs\t=\t3\r\n[data]\r\nroot = 'Caf\xc3\xa9'\r\n",
        '# 写真\n\ttrain.epochs = 3 # comment\n\tdata.root = """Café"""'.encode(),
    ],
)
def test_what_editors_write_is_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_bytes(content)
    assert read_toml(path) == {"train": {"epochs": 3}, "data": {"root": "Café"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = " + b"[" * 5000, "cannot be read as TOML: it nests tables or lists too deep"),
        (b"a = " + b"{a = " * 3000, "cannot be read as TOML: it nests tables or lists too deep"),
        (b".".join([b"a"] * 5000) + b" = 1", ": a is not a key of the configuration"),
        (b"[train]\nseeds = [" + b"9" * 5000 + b"]", "cannot be read as TOML: a number has too many digits"),
        (
            b'[data]\nroot = "C:\\Users\\me"\n',
            'line 2 (root = "C:\\Users\\me"): \\ in double quotes begins an escape; if it is a Windows path, write it '
            "in single quotes",
        ),
        (b'[data]\nroot = "D:\\photos\\"\n', "if it is a Windows path, write it in single quotes"),
        (b'[data]\nroot = "D:\\new\\temp"\n', "a Windows path is written in single quotes, where \\ is no escape"),
        ('[data]\nroot = "café"\n'.encode("latin-1"), 'is not UTF-8 (in line 2, in Latin-1 root = "café"); save it as'),
        ('[data]\nroot = "a"\n'.encode("utf-16"), "is text in UTF-16, as Notepad's “Unicode”; save it as UTF-8"),
        ('[data]\nroot = "a"\n'.encode("utf-16-le"), "is text in UTF-16"),
        (bytes(range(256)) * 9, "is no text; give the path of a study.toml"),
        (b"#" * (2**20 + 1), "is larger than 1 MB, and no study.toml is"),
        (b'{"train": {"seeds": [0, 1]}}', "it is JSON; write [train] before the keys of a table"),
        (b"# a study\ntrain:\n  seeds: [0, 1]\n", "it is YAML; write [train] before the keys of a table"),
        (b"[train]\nepochs = 3\nepochs = 4", "line 3 (epochs = 4): the key is there already; give each key once"),
        (b"[train]\nepochs = 3\n[train]\nseeds = [0]", "line 3 ([train]): the table is there already; write all keys"),
        (b"[train]\nepochs: 3", "line 2 (epochs: 3): expected one key = value, or [table]"),
        (b"[data]\nroot = photos", 'line 2 (root = photos): expected a number, true, false, a list as in [0, 1], or'),
        ("[data]\nroot = “photos”".encode(), 'text is written in straight quotes, as in "text"'),
        (b"[train\n", "cannot be read as TOML: line 1 ([train): expected ']' at the end of a table declaration"),
        (b'[data]\nroot = "photos', 'line 2 (root = "photos): the line ends inside text in quotes; close it on the'),
        (b"[train]\nseeds = [0, 1", "cannot be read as TOML: at its end: unclosed array"),
    ],
)  # fmt: skip
def test_what_is_no_toml_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    found = sentence(tmp_path / "study.toml", content)
    assert message in found
    assert found.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = 3", ": epochs is not a key of the configuration; it belongs in [pretrain] or [train] or [cond"),
        ("flip = true", ": flip is not a key of the configuration; it belongs in [train]"),
        ('[train]\noutputs = "x"', "; outputs belongs at the top of the file, before the first [table]"),
        ("[train]\nlr = 0.1", ": train.lr is not a key of the configuration; it belongs in [pretrain] or [conditions"),
        ("[train]\nbatch-size = 3", "; did you mean train.batch_size?"),
        ("[trian]\nepochs = 3", ": trian is not a key of the configuration; did you mean train?"),
        ('"\\u0007" = 3', ": '\\x07' is not a key of the configuration"),
        ('[train]\nseeds = "0,1"', ": train.seeds is '0,1'; expected a list, as in [0, 1]"),
        ("[train]\nseeds = 3", ": train.seeds is 3; expected a list, as in [0, 1]"),
        ("[train]\nseeds = []", ": train.seeds is an empty list; expected a list that is not empty, as in [0, 1]"),
        ("[train]\nseeds = [-1]", ": train.seeds holds -1; expected a whole number from 0"),
        ("[train]\nseeds = [true]", ": train.seeds holds true; expected a whole number from 0"),
        ("[train]\nseeds = [99999999999999999999]", "; expected a whole number of at most 9,223,372,036,854,775,807"),
        (f"[train]\nseeds = [0x{'f' * 5000}]", ": train.seeds holds a number of more than 40 digits; expected"),
        ("[train]\nbatch_size = 1e30", ": train.batch_size is 1e+30; expected a whole number of at most 9,223,372"),
        ("[train]\nepochs = 2.5", ": train.epochs is 2.5; expected a whole number from 1, as in 30"),
        ("[train]\nepochs = true", ": train.epochs is true; expected a whole number from 1, as in 30"),
        ("[train]\nflip = 2", ": train.flip is 2; expected true or false, as in true"),
        ("train = 5", ": train is 5; expected a table of keys, as in [train]"),
        ("[[train]]\nepochs = 3", ": train is a list of tables; expected a table of keys, as in [train]"),
        ("conditions = [1]", ": conditions is [1]; expected a table of tables, as in [conditions.NAME]"),
        ("conditions.a = 1", ": conditions.a is 1; expected a table of keys, as in [conditions.a]"),
        ("[conditions]", ": conditions is an empty table; give at least one, as in [conditions.finetuned]"),
        ("[conditions.a]\nlr = 1e400", ": conditions.a.lr is inf; expected a finite number above 0, as in 0.0001"),
        ("[conditions.a]\nlr = nan", ": conditions.a.lr is nan; expected a finite number above 0, as in 0.0001"),
        ("[conditions.a]\nlr = true", ": conditions.a.lr is true; expected a number above 0, as in 0.0001"),
        ("[statistics]\npower = 0.4", ": statistics.power is 0.4; expected a number from 0.5 and below 1, as in 0.8"),
        ("[statistics]\npermutations = 1000000000", "; expected a whole number from 1 to 10,000,000, as in 9999"),
        ("[statistics]\nequivalence = 0.1", "expected a table of names and values, as in {name = 0.01}"),
        ("[data]\nroot = 1979-05-27", ": data.root is the date or time 1979-05-27; expected text"),
        ('[data]\nroot = "a\\u0000b"', ": data.root is 'a\\x00b'; it holds a line break, a tab or another control"),
        ('[data]\nkind = "foldr"', ": data.kind is 'foldr'; expected one of digits, folder, indoor67, sports100"),
        ('outputs = ""', ": outputs is ''; expected text that is not empty, as in \"outputs\""),
        ('outputs = "~/out"', ": outputs is '~/out'; write the path in full, as only a shell knows what ~ means"),
        ("[measure]\nmetrics = []", '; expected a list that is not empty, as in ["distance", "entropy"]'),
        ("[measure]\nmetrics = [3]", ": measure.metrics holds 3; expected text"),
        ("[capture]\nlayers = [1, 1]", ": capture.layers names 1 more than once; name it once"),
        ("[hdf5]\ngrid = [3]", ": hdf5.grid is [3]; expected a list of 2, as in [1, 2]"),
        ("[hdf5]\npatch_px = [3]", ": hdf5.patch_px is [3]; expected a list of 2, as in [16, 16]"),
        ("[sweep]\nranks = []", ": sweep.ranks is an empty list; expected a list that is not empty, as in [1, 2]"),
    ],
)  # fmt: skip
def test_what_a_key_does_not_hold_is_named(text: str, message: str, tmp_path: Path) -> None:
    found = sentence(tmp_path / "study.toml", text.encode())
    assert message in found
    assert found.isprintable()


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is a named pipe"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path / "none.toml", "does not exist"),
    ):
        with pytest.raises(InputError, match=f"^configuration file {path} {message}; give the path of a study.toml$"):
            load_study(path, {})


def test_a_flag_is_named_as_one_beside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text("[train]\nepochs = 3\n")
    with pytest.raises(InputError, match=r"^--train\.epochs is 'x'; expected a whole number from 1, as in --train"):
        load_study(path, {"train.epochs": "x"})
    path.write_text("train = 3\n")
    with pytest.raises(InputError, match=r"toml: train is 3; expected a table of keys, as in \[train\]$"):
        load_study(path, {"train.epochs": "3"})
