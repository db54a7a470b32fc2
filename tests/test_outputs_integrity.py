"""What a study leaves is used as its stages wrote it, or it is named: flips, swaps, copies and roll-backs of files."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray
from synthetic_study import build_study, record_stages, results_of, small, texts

from engine.measure.table import read_table, write_table
from engine.report.inputs import Results
from engine.report.sections.relevance import load_relevance
from engine.study.journal import Journal
from store import StoreError
from store.disk import making_alone
from train.errors import DamagedFileError, InputError

READ = (
    "metrics/attention_metrics.zarr",
    "metrics/attention_comparison.json",
    "metrics/training.json",
    "samples.zarr",
    "visualizations/gradcam_samples",
    "study.toml",
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its journal."""
    return record_stages(small(tmp_path_factory.mktemp("study"), permutations=49))


@pytest.fixture
def study(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "outputs"))


def files_of(study: Path) -> Iterator[Path]:
    for name in READ:
        path = study / name
        yield from [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def test_a_flipped_bit_in_any_file_is_named_by_the_report(study: Path) -> None:
    """Every file that the report reads, pictures and metadata included; the journal's own lines are in test_journal."""
    generator = random.Random(3)
    files = list(files_of(study))
    assert len(files) > 60
    for file in files:
        content = bytearray(file.read_bytes())
        bit = generator.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        before = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(DamagedFileError, match="is not as it was written") as caught:
            results_of(study)
        assert next(name for name in READ if file.is_relative_to(study / name)) in str(caught.value)
        file.write_bytes(before)
    assert results_of(study).record.exists()


@pytest.mark.parametrize("what", ["swapped", "rolled back", "copied", "missing", "an older journal"])
def test_whole_files_in_the_wrong_place_are_named(what: str, study: Path, tmp_path: Path) -> None:
    comparison, training = study / "metrics/attention_comparison.json", study / "metrics/training.json"
    journal = study / "run.jsonl"
    match what:
        case "swapped":
            comparison.rename(study / "kept")
            training.rename(comparison)
            (study / "kept").rename(training)
        case "missing":
            training.unlink()
        case "copied":
            other = small(tmp_path / "other", permutations=49, effect=0.5)
            shutil.copyfile(other / "metrics/attention_comparison.json", comparison)
        case _:
            older = comparison.read_bytes(), journal.read_bytes()
            document = json.loads(older[0])
            document["data"]["images"] = 7
            comparison.write_text(json.dumps(document))
            lines = journal.read_bytes().splitlines(keepends=True)
            journal.write_bytes(b"".join(line for line in lines if b'"statistics"' not in line))
            record_stages(study)
            assert results_of(study).document.data["images"] == 7
            kept, content = (comparison, older[0]) if what == "rolled back" else (journal, older[1])
            kept.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"metrics/(attention_comparison|training)\.json is (not as|missing)"):
        results_of(study)


def test_what_no_stage_left_is_not_used(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Put there from another study: a run's maps, a relevance document; a table is not optional."""
    shutil.copytree(study / "samples.zarr/finetuned_seed42", study / "samples.zarr/baseline_seed7")
    (study / "metrics/relevance.json").write_text("{}")
    results = results_of(study)
    assert load_relevance(results) is None
    assert "relevance.json is left out: run.jsonl has no record of it" in capsys.readouterr().out
    shutil.copytree(study / "samples.zarr/finetuned_seed42", study / "samples.zarr/dora_seed42", dirs_exist_ok=True)
    with pytest.raises(DamagedFileError, match="dora_seed42 is not as it was written"):
        results_of(study)
    (study / "run.jsonl").write_text("")
    with pytest.raises(InputError, match=r"attention_metrics\.zarr: .*run\.jsonl has no record of it; make it again"):
        results_of(study)


def test_maps_of_runs_that_are_no_part_of_the_study_any_more_may_be_gone(study: Path) -> None:
    """Samples are begun again when other images are kept; the record of a seed that is not run any more stays."""
    extra = study / "samples.zarr/baseline_seed7"
    shutil.copytree(study / "samples.zarr/baseline_seed42", extra)
    Journal(study / "run.jsonl").stage("capture baseline seed 7", {}, [extra], lambda: None)
    shutil.rmtree(extra)
    assert results_of(study).samples is not None


def test_which_stage_was_done_again_last_changes_no_page(tmp_path: Path) -> None:
    outputs = record_stages(small(tmp_path))
    before = texts(outputs)
    journal = outputs / "run.jsonl"
    journal.write_bytes(b"".join(reversed(journal.read_bytes().splitlines(keepends=True))))
    assert texts(outputs) == before


def test_outputs_without_a_journal_are_read_and_the_page_says_so(tmp_path: Path) -> None:
    from synthetic_study import texts

    outputs = small(tmp_path, conditions=("only",), regions=(), samples=False, gradcam=False)
    assert isinstance(results_of(outputs), Results)
    assert "no run.jsonl vouches that they are as they were written" in texts(outputs)[1]
    assert "vouches" not in texts(record_stages(build_study(tmp_path / "with", metrics=("distance",), images=24)))[1]


def test_every_reader_notices_damage_of_the_table(tmp_path: Path) -> None:
    """The table's arrays carry a checksum of each chunk, strings included, for readers that know no journal."""
    outputs = small(tmp_path, samples=False, gradcam=False, permutations=49)
    table = read_of_others(outputs / "metrics/attention_metrics.zarr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's remark that string arrays have no specification yet
        path = write_table(table, tmp_path / "metrics")[0]
        assert read_table(path).identical(table)
        chunks = [file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json"]
        assert {file.relative_to(path).parts[0] for file in chunks} >= {"distance", "image", "condition", "site"}
        for file in chunks:
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            before = file.read_bytes()
            file.write_bytes(content)
            with pytest.raises((ValueError, RuntimeError)):
                read_of_others(path)
            file.write_bytes(before)


def read_of_others(path: Path) -> xarray.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = xarray.open_zarr(path, consolidated=False).load()
    for variable in table.variables.values():
        variable.encoding.clear()
    table.attrs["metrics"] = json.dumps(list(map(str, table.data_vars)))
    return table


class Images:
    ids, labels, class_names, region_names, boxes = ("a.png", "b.png"), (0, 1), ("x", "y"), (), None

    def picture(self, row: int) -> np.ndarray:
        return np.full((4, 4, 3), row, dtype=np.uint8)


def test_sample_maps_are_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    from engine.capture import SampleMaps

    path = tmp_path / "samples.zarr"
    with making_alone(path), pytest.raises(StoreError, match=r"samples\.zarr is being written by another process"):
        SampleMaps.create(path, Images(), [0, 1])  # type: ignore[arg-type]
    SampleMaps.create(path, Images(), [0, 1])  # type: ignore[arg-type]
    assert [file.name for file in tmp_path.iterdir()] == ["samples.zarr"]


def test_every_reader_notices_damage_of_the_sample_maps(tmp_path: Path) -> None:
    import zarr

    from engine.capture import SampleMaps

    path = tmp_path / "samples.zarr"
    SampleMaps.create(path, Images(), [0, 1])  # type: ignore[arg-type]
    chunks = [file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json"]
    assert {file.relative_to(path).parts[1] for file in chunks} == {"pixels", "label", "id"}
    for file in chunks:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match="checksum"):
            zarr.open_array(path / "images" / file.relative_to(path).parts[1], mode="r")[...]
