"""The study as dataclasses and TOML: every key here is a key of `study.toml` and a flag of the command line.

Nothing heavy is imported: `--help` reads this module and answers at once.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from engine.config.toml_file import read_toml
from engine.config.values import GONE, described, plain_value, shortened, validated
from store.redaction import redacted
from store.schema import STORED_MAPS
from train.choices import DATA_KINDS, DataKind, SplitRule
from train.errors import InputError
from train.keys import STRICT, TWO, Count, Name, Natural, Place, Rate, Real, Scenes, Text, Whole, key
from train.settings import ConditionConfig, PretrainConfig, SweepConfig, TrainConfig

EMBEDDED_STUDY = Path(__file__).with_name("digits.toml")

Pixels = Annotated[Natural, Le(16_384)]
Resamples = Annotated[Count, Le(10_000_000)]
Proportion = Annotated[Real, Gt(0.0), Lt(1.0)]
Argument = bool | Whole | Real | Text

# One module per method: its file's name is the method's. They are looked up, not imported: they need torch.
_METHODS = Path(__file__).resolve().parents[1] / "relevance" / "methods"
RELEVANCE_METHODS = tuple(sorted(path.stem for path in _METHODS.glob("[a-z]*.py")))
BASELINES = {"blur": "the blurred image", "mean": "the data set's mean"}
"""What a patch that is taken away shows: name -> in words."""
if TYPE_CHECKING:
    MethodName = str
    Baseline = str
    EncodingName = str
else:
    MethodName, Baseline = Literal[RELEVANCE_METHODS], Literal[tuple(BASELINES)]
    EncodingName = Literal[tuple(STORED_MAPS)]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which Vision Transformer."""

    __pydantic_config__ = STRICT
    name: Name = key(
        "vit_base_patch16_224.augreg_in21k",
        "a timm model name, or digits_vit: the small model of the embedded study",
    )
    arguments: dict[Name, Argument] = key(
        {}, "what timm builds the model with besides, as in global_pool=avg,in_chans=1,init_values=1e-5"
    )
    pretrained: bool = key(True, "let timm download pretrained weights when no file is given")
    weights: Place = key("", "a .safetensors or .pth file; nothing is downloaded then")
    adapter: Place = key("", "adapters of peft (LoRA, DoRA) for these weights: the folder that it saved, or its file")
    state: Text = key(
        "", "key of the file under which the weights are, such as model_ema; empty: the usual one, which the log says"
    )
    img_size: Pixels = key(0, "input size in pixels; 0: as a checkpoint of ours was trained, else the model's own")
    classes: Place = key(
        "",
        "file of class names in the order of a given model's outputs, one per line or JSON; empty: its sidecar's, else "
        "the class folders where there are as many",
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    __pydantic_config__ = STRICT
    kind: DataKind = key("digits", "; ".join(f"{kind}: {help}" for kind, help in DATA_KINDS.items()))
    root: Place = key(
        "",
        "the folder of class folders (or of train/, val/ and test/ with class folders in each); indoor67: of Images/ "
        "and the official lists",
    )
    split: SplitRule = key(
        "auto",
        "stratified: 70/15/15 within each class; official: indoor67's lists; folders: train/val/test folders; "
        "all: every image is test; auto: folders for sports100, else stratified, but all in compare and capture",
    )
    seed: Natural = key(42, "seed of the split or of the composed scenes, and of weights that come from no file")
    follow_links: bool = key(
        False, "take what links lead to, wherever it lies; false: a link that leaves the folder is refused"
    )
    class_order: Literal["auto", "string", "natural"] = key(
        "auto",
        "order of class folders when a given model was trained; string: 1, 10, 2, as torchvision; natural: 1, 2, 10, "
        "as timm; auto: known where both are the same",
    )
    cache: bool = key(True, "decode every picture once, into an image cache; false: decode whenever it is needed")
    cache_folder: Place = key("", "folder of the image cache; empty: cache/ in the outputs folder")
    prepare_as: Text = key(
        "",
        "checkpoints that were trained on images prepared in different ways: the condition whose way all images get, "
        "or model: the timm model's own; empty: they are refused",
    )
    train_scenes: Scenes = key(8000, "digits: scenes in the target task's training split")
    validation_scenes: Scenes = key(1024, "digits: scenes in each validation split")
    test_scenes: Scenes = key(1024, "digits: scenes in each test split")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Attention capture."""

    __pydantic_config__ = STRICT
    sinks: Annotated[tuple[Literal["metrics", "store"], ...], MinLen(1)] = key(
        ("metrics",), "metrics: measure on the spot; store: keep the maps"
    )
    encoding: EncodingName = key(
        "fp16", "how attention is stored: fp16 or bf16: its maps; qk: the query and key they are made of"
    )
    batch_size: Annotated[Count, Le(65_536)] = key(32, "images per forward pass, and per shard of the store")
    layers: tuple[Natural, ...] = key((), "layers to capture, in depth order from 0; empty: all")
    heads: tuple[Natural, ...] = key((), "heads of each layer to capture, from 0; empty: all")
    samples: Natural = key(8, "seeded images whose whole maps are kept for the report")
    store: Place = key("", "capture: the store to write")


def _backends() -> str:
    from kernels import BACKENDS  # lazy: a command that needs none has none loaded

    on_cpu = [name for name, backend in BACKENDS.items() if "cpu" in backend.devices]
    on_cuda = [name for name in BACKENDS if name not in on_cpu]
    return f"auto, {', '.join(on_cpu)}; on CUDA also {', '.join(on_cuda)}"


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Metrics over captured attention."""

    __pydantic_config__ = STRICT
    metrics: Annotated[tuple[Name, ...], MinLen(1)] = key(
        ("distance", "entropy", "morans_i", "prefix_mass"), "metric names, or module:name of your own"
    )
    conventions: bool = key(
        False,
        "measure in the same pass what they measure by other published conventions, and say which findings depend on "
        "the convention",
    )
    backend: Name = key("auto", _backends)
    store: Place = key("", "measure: the store to read")
    against: Place = key("", "measure: the second condition's store, which pair metrics compare with")
    scheduler: Text = key("", "tcp://HOST:PORT of a Dask scheduler whose workers measure; without: this process")

    def __post_init__(self) -> None:
        """Found before the hours that may lie before the first measurement."""
        if self.scheduler and not re.fullmatch(r"[a-z]+://[^\s@?#]+:\d+", self.scheduler):
            raise InputError(
                f"measure.scheduler is {redacted(self.scheduler)!r}; expected tcp://HOST:PORT of a running "
                "`dask scheduler`"
            )


@dataclass(frozen=True, kw_only=True)
class Hdf5Config:
    """Attention to and from HDF5: the commands export and import."""

    __pydantic_config__ = STRICT
    file: Place = key("", "export: the file to write; import: the file to read")
    axes: tuple[Literal["image", "layer", "head", "query", "key"], ...] = key(
        (), "import: what the axes of its datasets are, in order, as in layer,image,head,query,key; empty: as it says"
    )
    grid: Annotated[tuple[Count, ...], TWO] = key(
        (), "import: rows and columns of patches, where the file does not say it"
    )
    prefix_tokens: Natural = key(1, "import: class and register tokens before the patches")
    patch_px: tuple[Count, Count] = key((16, 16), "import: height and width of a patch in pixels")
    class_token: bool = key(True, "import: whether the first prefix token is a class token")


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """Paired comparisons."""

    __pydantic_config__ = STRICT
    primary: tuple[Name, ...] = key(
        ("distance", "entropy", "morans_i"),
        "metrics whose layer means are the primary family, named before the data are measured; the rest is exploratory",
    )
    permutations: Resamples = key(9999, "resamples of images, sign flips of runs: behind every p and interval")
    confidence: Proportion = key(0.95, "coverage of the intervals")
    alpha: Proportion = key(0.05, "level below which an adjusted p-value is marked")
    power: Annotated[Real, Ge(0.5), Lt(1.0)] = key(0.8, "power of the minimum detectable effect, from 0.5")
    equivalence: dict[str, Rate] = key(
        {},
        "bounds of a negligible difference in each metric's unit, set beforehand: distance=0.01,entropy=0.1",
    )
    cluster_alpha: Proportion = key(0.05, "level whose critical t makes neighbouring layers a cluster")
    seed: Natural = key(0, "seed of resamples and flips")


@dataclass(frozen=True, kw_only=True)
class RelevanceConfig:
    """Relevance maps: pictures of sample images, and measurements on more."""

    __pydantic_config__ = STRICT
    methods: Annotated[tuple[MethodName, ...], MinLen(1)] = key(("gradcam", "generic"), ", ".join(RELEVANCE_METHODS))
    images: Count = key(8, "sample images that are drawn; no more than capture.samples")
    measured: Natural = key(48, "seeded images on which maps are measured; 0: none")
    baseline: Baseline = key("blur", f"what replaces a patch that is taken away: {', or '.join(BASELINES.values())}")
    steps: Annotated[Count, Le(1000)] = key(9, "shares of patches between 0 and 1 at which the model is asked again")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study."""

    __pydantic_config__ = STRICT
    outputs: Annotated[Place, MinLen(1)] = key("outputs", "folder of everything the study writes")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto: cuda when there is one")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    conditions: dict[str, ConditionConfig] = field(
        default_factory=lambda: {
            "baseline": ConditionConfig(recipe="probe"),
            "finetuned": ConditionConfig(recipe="full"),
            "dora": ConditionConfig(recipe="dora"),
        }
    )
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    hdf5: Hdf5Config = field(default_factory=Hdf5Config)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    relevance: RelevanceConfig = field(default_factory=RelevanceConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        """Conditions name files and folders: of every kind of file system, and no other folder's."""
        if not self.conditions:
            raise InputError("conditions is an empty table; give at least one, as in [conditions.finetuned]")
        taken: dict[str, str] = {}
        for name in self.conditions:
            if not _NAME.fullmatch(name) or name in (".", ".."):
                raise InputError(
                    f"a condition is named {name!r}; expected letters of A to Z, digits and . _ - (at most 64, not . "
                    "or ..), for files are named after it"
                )
            other = taken.setdefault(name.lower(), name)
            if other != name:
                raise InputError(
                    f"conditions {other} and {name} differ in upper and lower case alone, which not every disk tells "
                    "apart in the names of files; rename one"
                )
            _check_recipe(name, self.conditions[name])


def _check_recipe(name: str, condition: ConditionConfig) -> None:
    """Whether the recipe of a condition reads what is set: a rank beside recipe full was meant for another recipe."""
    for declared in dataclasses.fields(condition):
        recipes = declared.metadata["recipes"]
        value = getattr(condition, declared.name)
        if recipes and condition.recipe not in recipes and value != declared.default:
            raise InputError(
                f"conditions.{name}.{declared.name} is {value!r}, and recipe {condition.recipe} makes no use of it; "
                f"leave it out, or set conditions.{name}.recipe to one that does ({', '.join(recipes)})"
            )


def config_keys(conditions: Iterable[str]) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every key of the configuration with its dotted name, in order; `conditions` names the conditions to list."""
    hints = typing.get_type_hints(StudyConfig)
    for section in dataclasses.fields(StudyConfig):
        if section.name == "conditions":
            tables = {f"conditions.{name}": ConditionConfig for name in conditions}
        elif dataclasses.is_dataclass(hints[section.name]):
            tables = {section.name: hints[section.name]}
        else:
            tables = {}
            yield section.name, section
        for table, cls in tables.items():
            yield from ((f"{table}.{declared.name}", declared) for declared in dataclasses.fields(cls))


def parse_value(dotted: str, text: str) -> Any:
    """A flag's text as a configuration value: a list where the key holds one (`a,b,c`), or a table (`a=1,b=2`)."""
    *sections, name = _split(dotted)
    cls: Any = StudyConfig
    if sections:
        cls = ConditionConfig if sections[0] == "conditions" else typing.get_type_hints(cls)[sections[0]]
    hint = typing.get_type_hints(cls)[name]
    kind = typing.get_origin(hint)
    if kind not in (tuple, dict):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if kind is tuple:
        return parts
    of_any_type = str in typing.get_args(typing.get_args(hint)[1])
    table: dict[str, Any] = {}
    for part in parts:
        key, equals, value = (side.strip() for side in part.partition("="))
        if not equals or not key:
            raise InputError(f"--{dotted}: {described(part)} is not of the form name=value; write a=1,b=2")
        if key in table:
            raise InputError(f"--{dotted} gives {described(key)} twice; give it once")
        table[key] = plain_value(value) if of_any_type else value
    return table


def _split(dotted: str) -> list[str]:
    """The parts of a dotted key; a condition's name may have dots itself."""
    first, _, rest = dotted.partition(".")
    if first != "conditions" or "." not in rest:
        return dotted.split(".")
    condition, _, key = rest.rpartition(".")
    return [first, condition, key]


def load_study(path: Path | None, overrides: Mapping[str, Any]) -> StudyConfig:
    """The configuration: defaults, then the file, then the flags.

    Args:
        path: a study.toml; None: the embedded study, unless the flags ask for another kind of data.
        overrides: dotted key -> value, e.g. {"train.seeds": ["0", "1"]}.

    Raises:
        InputError: no such file, not TOML, an unknown key, or a value of the wrong kind.
    """
    if path is None and overrides.get("data.kind", "digits") == "digits":
        path = EMBEDDED_STUDY
    values = read_toml(path) if path is not None else {}
    if "conditions" not in values and "conditions" not in overrides:
        values["conditions"] = dataclasses.asdict(StudyConfig())["conditions"]
    for dotted, value in overrides.items():
        *sections, name = _split(dotted)
        table = values
        for section in sections:
            if not isinstance(inner := table.setdefault(section, {}), dict):
                found = f"{path}: {shortened(section)} is {described(inner)}"
                raise InputError(f"{found}; expected a table of keys, as in [{shortened(section)}]")
            table = inner
        table[name] = copy.deepcopy(value)  # later flags write into it

    def called(dotted: str) -> str:
        """What a sentence calls a key, or, without one, what the sentence begins with."""
        return f"--{dotted}" if path in (None, EMBEDDED_STUDY) or dotted in overrides else f"{path}: {dotted}"

    for dotted, reason in GONE.items():
        section, _, name = dotted.partition(".")
        if isinstance(values.get(section), dict) and name in values[section]:
            del values[section][name]
            logging.getLogger(__name__).info("%s is left out: %s", called(dotted), reason)
    conditions = values["conditions"] if isinstance(values["conditions"], dict) else {}
    return validated(StudyConfig, values, called, [key for key, _ in config_keys(conditions or ["NAME"])])


def study_toml(config: StudyConfig) -> str:
    """The configuration as a study.toml with every key, which given back repeats the study; without secrets of URLs."""
    import tomli_w

    return tomli_w.dumps(_plain(dataclasses.asdict(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
