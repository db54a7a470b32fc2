"""One flipped bit, or a file that is another's, older, cut, empty or gone: named, healed, or harmless by proof.

Over every kind of file that a study, a comparison, a sweep, captures, an export and a user's checkpoint leave.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator

import pytest

from store import AttentionStore, StoreError
from tests.damage import Subject, Verdict, exchanged_units, flips, put, replacements, table, try_all
from tests.damage_steps import call, still_clock
from tests.damage_subjects import SUBJECTS

# Subject -> flipped bits and replaced files, in all of the slow tests: 1,240 and 350.
MANY = {
    "study": (360, 120),
    "interrupted": (60, 20),
    "compare": (170, 40),
    "fp16": (140, 50),
    "bf16": (140, 30),
    "qk": (140, 50),
    "sweep": (130, 40),
    "checkpoint": (100, 0),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Subject]]:
    """Subjects by name, each made once."""
    subjects: dict[str, Subject] = {}

    def make(name: str) -> Subject:
        if name not in subjects:
            subjects[name] = SUBJECTS[name](tmp_path_factory.mktemp(name))
        return subjects[name]

    with still_clock():
        yield make


def check(verdicts: list[Verdict]) -> None:
    print(table(verdicts))
    failed = [str(verdict) for verdict in verdicts if verdict.ending == "failed"]
    assert not failed, "\n".join(failed)


def test_flips_and_replaced_files_of_a_capture(made: Callable[[str], Subject]) -> None:
    subject = made("fp16")
    check(try_all(subject, flips(subject, 5, seed=0)))
    check(try_all(subject, replacements(subject, 4, seed=0)))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", MANY)
def test_many_flips(made: Callable[[str], Subject], name: str) -> None:
    check(try_all(made(name), flips(made(name), MANY[name][0], seed=1)))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [name for name, (_, files) in MANY.items() if files])
def test_many_replaced_files(made: Callable[[str], Subject], name: str) -> None:
    check(try_all(made(name), replacements(made(name), MANY[name][1], seed=1)))


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["study", "compare"])
def test_units_of_another_run_and_of_an_earlier_one(made: Callable[[str], Subject], name: str) -> None:
    check(try_all(made(name), exchanged_units(made(name))))


# --- what a foreign shard must not leave behind -----------------------------------------------------------------------


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of another size are taken, as if sizes were the same: those of random weights are, now and then."""
    monkeypatch.setattr("store.rows.size_problem", lambda size, entry: "" if size is not None else "is missing")


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("encoding", ["fp16", "qk"])
def test_a_store_healed_after_a_swap_holds_no_value_of_the_foreign_shard(
    made: Callable[[str], Subject], encoding: str
) -> None:
    """Shards and the capture's own values of another run, sound in themselves, in either store of a pair."""
    subject = made(encoding)
    measure, against, export = subject.remake[2:]
    rng = random.Random(0)
    later = subject.forget["shard"]
    for store, kind, uses in (
        ("a.zarr", "shard", (measure, against, export)),
        ("second/b.zarr", "shard", (against,)),
        ("a.zarr", "metric value", ()),
    ):
        own = [name for name in subject.by_kind()[kind] if name.startswith(store)]
        own = [name for name in own if not name.startswith(tuple(later))]
        name = rng.choice([name for name in own if subject.foreign[name] != subject.sound[name]])
        for folder in later:
            shutil.rmtree(subject.home / folder)
        put(subject.home / name, subject.foreign[name])
        try:
            # Whoever measures the foreign shard, or reads the foreign value, is stopped and says which file it was.
            for use in uses:
                code, said = use()
                assert (code, name.partition(".zarr/")[2].rpartition("/")[0] in said) == (1, True), said
            if kind == "metric value":
                found = AttentionStore.open(subject.home / store)
                read = found.read_undefined if "/undefined/" in name else found.read_metric
                with pytest.raises(StoreError, match=r"c\.\d\S* is damaged"):
                    read(name.split("metrics/")[1].split("/")[0])
            code, said = call(["verify", str(subject.home / store)])
            assert (code, name.removeprefix("second/") in said) == (1, True), said
            # The same commands heal it: every value, counts and export among them, is of the right shards.
            for step in subject.remake:
                code, said = step()
                assert code == 0, said
            assert subject.changed() == []
        finally:
            subject.restore()
