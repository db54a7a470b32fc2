"""Configuration: TOML, flags, round trip, and what is said about a mistake."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from engine.config.study import (
    EMBEDDED_STUDY,
    ConditionConfig,
    StudyConfig,
    config_keys,
    load_study,
    parse_value,
    study_toml,
)
from engine.run.command_line import _CONDITION_FLAG
from train.errors import InputError


def test_nothing_given_is_the_embedded_study() -> None:
    config = load_study(None, {})
    assert config == load_study(EMBEDDED_STUDY, {})
    assert config.data.kind == "digits"
    assert {name: condition.recipe for name, condition in config.conditions.items()} == {
        "baseline": "probe",
        "finetuned": "full",
        "dora": "dora",
    }


def test_a_written_study_gives_itself_back(tmp_path: Path) -> None:
    config = load_study(None, {"train.seeds": ["0", "1"], "conditions.dora.rank": "4", "data.kind": "folder"})
    assert config.train.seeds == (0, 1)
    assert config.conditions["dora"].rank == 4
    assert config.conditions["baseline"].recipe == "probe", "an override of one condition keeps the others"
    path = tmp_path / "study.toml"
    path.write_text(study_toml(config), encoding="utf-8")
    assert load_study(path, {}) == config


def test_every_key_has_help() -> None:
    keys = dict(config_keys(["baseline"]))
    assert len(keys) > 40
    assert not [key for key, declared in keys.items() if not declared.metadata.get("help")]


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(
        '[train]\nepochs = 7\nlabel_smoothing = 0.0\n[conditions.mine]\nrecipe = "full"\n', encoding="utf-8"
    )
    config = load_study(path, {"train.epochs": "9"})
    assert config.train.epochs == 9
    assert config.train.label_smoothing == 0.0
    assert list(config.conditions) == ["mine"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.epoch": "3"}, r"train\.epoch is not a key of the configuration; did you mean train\.epochs\?"),
        ({"conditions.x.recipee": "full"}, r"did you mean conditions\.x\.recipe\?"),
        (
            {"train.epochs": "three"},
            r"--train\.epochs is 'three'; expected a whole number from 1, as in --train\.epochs 30$",
        ),
        ({"train.epochs": "0"}, r"--train\.epochs is '0'; expected a whole number from 1"),
        ({"data.kind": "foldr"}, r"--data\.kind is 'foldr'; expected one of digits, folder, indoor67, sports100$"),
        ({"capture.sinks": ["metric"]}, r"--capture\.sinks holds 'metric'; expected one of metrics, store$"),
        (
            {"statistics.confidence": "1.5"},
            r"is '1\.5'; expected a number above 0 and below 1, as in .* 0\.95$",
        ),
    ],
)
def test_a_mistake_is_named_with_what_was_expected(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_study(None, overrides)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"configuration file .*none\.toml does not exist; give the path"):
        load_study(tmp_path / "none.toml", {})
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken\.toml cannot be read as TOML"):
        load_study(broken, {})


def test_defaults_are_valid() -> None:
    assert StudyConfig().measure.metrics == ("distance", "entropy", "morans_i", "prefix_mass")
    assert load_study(None, {"data.kind": "folder"}) == StudyConfig(data=StudyConfig().data.__class__(kind="folder"))


def test_a_table_of_numbers_is_a_flag() -> None:
    value = parse_value("statistics.equivalence", "distance=0.01, entropy=0.1")
    config = load_study(None, {"statistics.equivalence": value})
    assert config.statistics.equivalence == {"distance": 0.01, "entropy": 0.1}
    assert tomllib.loads(study_toml(config))["statistics"]["equivalence"] == {"distance": 0.01, "entropy": 0.1}
    with pytest.raises(InputError, match="'distance' is not of the form name=value"):
        parse_value("statistics.equivalence", "distance")
    with pytest.raises(InputError, match=r"equivalence\.distance is '0'; expected a number above 0"):
        load_study(None, {"statistics.equivalence": {"distance": "0"}})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../../evil", "/abs", "a\\b", "a\0b", "é", "a b", "x" * 65])
def test_a_condition_has_a_name_that_a_file_can_have(tmp_path: Path, name: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f"[conditions.{json.dumps(name)}]\nrecipe = 'full'\n", encoding="utf-8")
    for make in (
        lambda: load_study(path, {}),
        lambda: load_study(None, {"conditions": {name: {"recipe": "full"}}}),
        lambda: StudyConfig(conditions={name: ConditionConfig()}),
    ):
        with pytest.raises(InputError, match=r"a condition is named .*; expected letters of A to Z, digits and"):
            make()


def test_conditions_that_one_file_name_stands_for_are_refused() -> None:
    with pytest.raises(InputError, match="conditions LoRA and lora differ in upper and lower case alone"):
        load_study(None, {"conditions": {"LoRA": {"recipe": "lora"}, "lora": {"recipe": "lora"}}})


def test_a_condition_with_a_dot_has_flags() -> None:
    conditions = {"lora.r8": {"recipe": "lora"}}
    config = load_study(None, {"conditions": conditions, "conditions.lora.r8.rank": "4"})
    assert config.conditions["lora.r8"].rank == 4
    assert parse_value("conditions.lora.r8.rank", "4") == "4"
    assert _CONDITION_FLAG.fullmatch("--conditions.lora.r8.rank=4")[1] == "lora.r8"


@pytest.mark.parametrize(
    ("key", "value", "twice"),
    [
        ("measure.metrics", ["gini", "distance", "gini"], "'gini'"),
        ("train.seeds", [1, 2, 2], "2"),
        ("capture.layers", [0, 0], "0"),
        ("relevance.methods", ["lrp", "lrp"], "'lrp'"),
    ],
)
def test_a_list_names_a_thing_once(key: str, value: list[object], twice: str) -> None:
    with pytest.raises(InputError, match=f"{key} names {twice} more than once; name it once"):
        load_study(None, {key: value})


def test_sizes_may_be_equal() -> None:
    assert load_study(None, {"hdf5.grid": ["5", "5"]}).hdf5.grid == (5, 5)


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        (
            {"recipe": "full", "rank": 4},
            "conditions.x.recipe to one that does (lora, dora)",
        ),
        (
            {"recipe": "probe", "layer_decay": 0.5},
            "conditions.x.layer_decay is 0.5, and recipe probe makes no use of it",
        ),
        ({"recipe": "probe", "lr": 0.1}, "conditions.x.lr is 0.1, and recipe probe makes no use of"),
        ({"recipe": "checkpoint", "epochs": 3}, "conditions.x.epochs is 3, and recipe checkpoint makes no use of it"),
        ({"recipe": "lora", "checkpoint": "a.pth"}, "conditions.x.checkpoint is 'a.pth', and recipe lora makes no use"),
    ],
)
def test_what_a_recipe_does_not_read_is_refused(condition: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        StudyConfig(conditions={"x": ConditionConfig(**condition)})


def test_a_key_of_an_earlier_version_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A study.toml of then repeats its study."""
    study = tmp_path / "study.toml"
    study.write_text("[statistics]\nbootstrap = 2000\npermutations = 99\n")
    with caplog.at_level("INFO"):
        config = load_study(study, {})
    assert config.statistics.permutations == 99
    assert "bootstrap" not in study_toml(config)
    said = "statistics.bootstrap is left out: statistics.permutations is the number of resamples, too"
    assert caplog.messages == [f"{study}: {said}"]
