"""Every backend on a layer of ViT-B at four grid sizes: checked against the reference, timed, set against its floor."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import copies_beyond_cache, device_of, median_seconds
from kernels import METRICS, TokenLayout, measure_attention, measure_qk
from kernels.inputs import Factors, Maps
from kernels.torch_ops import BACKEND
from tests.cases import FROM_QK, TOLERANCE, layout

__all__ = ["measure"]

CORE = ("distance", "entropy", "morans_i")
HEADS, LAYERS, HEAD_DIM = 12, 12, 64
# (dtype, whether from query and key): first what models compute in and what is stored.
WORKS = (
    *((torch.bfloat16, True), (torch.float16, False), (torch.float16, True)),
    *((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)),
)
INPUT_BYTES = 120e6  # of one input in 16 bits; several are used in turn
SLOW_TO_COMPILE = (197,)  # tokens for which torch.compile and numba_cuda are measured, too


@dataclass(frozen=True)
class Work:
    """One layer of so many images: fresh random inputs, and what a pass over them must move and do."""

    of: TokenLayout
    images: int
    dtype: torch.dtype
    device: torch.device
    from_qk: bool

    def draw(self) -> tuple[torch.Tensor, ...]:
        """(attention,), or query and key as views of a fused projection, as timm's models hand them over."""
        tokens = self.of.num_tokens
        fused = torch.randn(self.images, tokens, 3, HEADS, HEAD_DIM, device=self.device)
        fused = (1.2 * fused).to(self.dtype)
        query, key, _ = fused.permute(2, 0, 3, 1, 4).unbind(0)
        if self.from_qk:
            return query, key
        attention = torch.empty(self.images, HEADS, tokens, tokens, dtype=self.dtype, device=self.device)
        for image in range(self.images):
            logits = query[image].float() @ key[image].float().mT / 8
            attention[image] = logits.softmax(dim=-1)
        return (attention,)

    @property
    def everyday(self) -> bool:
        """Whether this is what models compute in, or what is stored: the rest is for the fastest backend alone."""
        return self.dtype == (torch.bfloat16 if self.from_qk else torch.float16)

    @property
    def by_all(self) -> bool:
        return self.everyday and self.of.num_tokens in SLOW_TO_COMPILE and self.device.type == "cuda"

    @property
    def nbytes(self) -> int:
        """Input, each value once."""
        tokens = self.of.num_tokens
        per_map = 2 * tokens * HEAD_DIM if self.from_qk else tokens * tokens
        return self.images * HEADS * per_map * self.dtype.itemsize

    def floor(self, ceilings: dict[str, float]) -> tuple[float | None, str]:
        """(seconds of the pass at the limits that were measured, the one that binds)."""
        elements = self.images * HEADS * self.of.num_tokens**2
        products = "fp32" if self.dtype == torch.float32 else "bf16"
        amounts = {"copy": ("bandwidth", self.nbytes / 1e9), "exp": ("exponentials", elements / 1e12)}
        if self.from_qk:
            amounts[products] = (f"{products} products", 2 * HEAD_DIM * elements / 1e12)
        times = {name: amount / ceilings[key] for key, (name, amount) in amounts.items() if key in ceilings}
        binding = max(times, key=times.__getitem__, default="")
        return times.get(binding), binding


def measure(grid: tuple[int, int], small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """Rows in images a second: an image has 12 layers of 12 heads."""
    of = layout(2, 3, 1) if small else layout(*grid, 1)
    images = 1 if small else max(2, round(INPUT_BYTES / (2 * HEADS * of.num_tokens**2)))
    # Not by its number, which would begin this process's context, and processes are started first.
    device = torch.device("cpu" if small else "cuda")
    works = [Work(of, images, dtype, device, from_qk) for dtype, from_qk in WORKS]
    if not small:
        _compile_at_once(works)
    for work in works:
        yield from _of_work(replace(work, device=device_of(small)), ceilings, small)
        if not small:
            torch.cuda.empty_cache()


def _of_work(work: Work, ceilings: dict[str, float], small: bool) -> Iterator[Row]:
    what = "measure_qk" if work.from_qk else "measure_attention"
    dtype = str(work.dtype).removeprefix("torch.")
    backends = ["torch"] if small else ["triton"]
    if not small and work.everyday:
        backends += ["torch"]
    if work.by_all and not work.from_qk:
        backends += ["numba_cuda"]
    runs: dict[str, Callable[..., Any]] = {name: public(work, name) for name in backends}
    errors = _check(work, runs)
    if work.by_all:
        runs["torch, compiled"] = _compiled(work)
    inputs = [work.draw() for _ in range(copies_beyond_cache(work.nbytes, work.device))]
    seconds, notes = {}, {}
    for name, run in runs.items():
        if name not in errors:
            try:
                seconds[name], notes[name] = median_seconds([partial(run, *given) for given in inputs], work.device)
            except Exception as error:  # of one backend: the others are measured all the same
                errors[name] = f"{type(error).__name__}: {error}"
    floor, bound_by = work.floor(ceilings)
    sdpa = None
    if work.from_qk and work.dtype != torch.float32:
        sdpa, row = _sdpa(work, inputs)
        yield row
    for name, error in errors.items():
        full_name = f"{what}, {work.of.num_tokens} tokens, {dtype}, {name}"
        yield Row(name=full_name, value=0.0, unit="images/s", error=error)
    for name in seconds:
        yield Row(
            name=f"{what}, {work.of.num_tokens} tokens, {dtype}, {name}",
            value=work.images / LAYERS / seconds[name],
            unit="images/s",
            limit=work.images / LAYERS / floor if floor else None,
            bound_by=bound_by,
            times_compiled=seconds["torch, compiled"] / seconds[name] if "torch, compiled" in seconds else None,
            times_sdpa=sdpa / seconds[name] if sdpa else None,
            note=notes[name],
        )


def _sdpa(work: Work, inputs: Sequence[tuple[torch.Tensor, ...]]) -> tuple[float, Row]:
    """(seconds, the row) of a forward pass of attention alone, by the kernel that torch chooses."""
    given = [(query, key, torch.randn_like(key)) for query, key in inputs]
    chosen = SDPBackend(torch._fused_sdp_choice(*given[0])).name.lower()  # type: ignore[attr-defined]
    runs = [partial(functional.scaled_dot_product_attention, *each) for each in given]
    seconds, note = median_seconds(runs, work.device)
    dtype = str(work.dtype).removeprefix("torch.")
    name = f"scaled_dot_product_attention, {work.of.num_tokens} tokens, {dtype}"
    note = ", ".join(filter(None, (f"forward, {chosen}", note)))
    return seconds, Row(name=name, value=work.images / LAYERS / seconds, unit="images/s", note=note)


def public(work: Work, backend: str) -> Callable[..., Any]:
    """The public function, as the metrics sink calls it: rows that are no attention are counted, not raised."""
    if work.from_qk:
        return lambda query, key: measure_qk(query, key, work.of, CORE, backend=backend, invalid="mask")
    return lambda attention: measure_attention(attention, work.of, CORE, backend, "mask")


def _compiled(work: Work) -> Callable[..., Any]:
    """The `torch` backend's pass and its means as one compiled graph."""
    specs = [METRICS[name] for name in CORE]

    def run(*given: torch.Tensor) -> Any:
        if work.from_qk:
            found = BACKEND.measure_qk(Factors(*given, work.of, None, 1 / math.sqrt(HEAD_DIM), None), specs)
        else:
            found = BACKEND.measure_attention(Maps(*given, work.of, None, "bfloat16"), specs)
        return [values.nanmean(dim=-1, dtype=torch.float64) for values in found.values.values()], found.valid

    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, dynamic=False)


def _compile_at_once(works: Sequence[Work]) -> None:
    """What is compiled is left in Triton's and torch's caches by processes side by side: in turn it takes a minute."""
    context = multiprocessing.get_context("fork")
    makers: list[Callable[[Work], Any]] = [partial(public, backend="triton") for _ in works]
    jobs = [*zip(makers, works, strict=True), *((_compiled, work) for work in works if work.by_all)]
    processes = [context.Process(target=_run_once, args=job) for job in jobs]
    for process in processes:
        process.start()
    if any(work.by_all for work in works):
        importlib.import_module("torch._inductor.compile_fx")  # seconds, meanwhile
    for process in processes:
        process.join()


def _run_once(make: Callable[[Work], Callable[..., Any]], work: Work) -> None:
    try:
        make(work)(*work.draw())
        torch.cuda.synchronize()
    except Exception:  # where it is measured it fails again, and is reported
        traceback.print_exc()
    finally:
        os._exit(0)  # no compiler's worker is waited for


def _check(work: Work, runs: dict[str, Callable[..., Any]]) -> dict[str, str]:
    """Each against the float64 reference on a fresh draw, in memory that held NaN before; what is wrong with which."""
    few = Work(work.of, 1, work.dtype, work.device, work.from_qk)
    given = tuple(tensor[:, :2] for tensor in few.draw())  # one map would be code of its own
    reference = public(few, "reference")(*(tensor.cpu() for tensor in given))
    errors = {}
    for name, run in runs.items():
        poison = [torch.full((2**20,), math.nan, device=work.device) for _ in range(8)]
        poison.clear()
        try:
            _compare(run(*given), reference, FROM_QK if work.from_qk else TOLERANCE)
        except Exception as error:  # of one backend: the others are measured all the same
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def _compare(got: Any, reference: Any, tolerances: dict[str, float]) -> None:
    if got.masked != reference.masked:
        raise AssertionError(f"{got.masked} rows are invalid, {reference.masked} in the reference")
    for metric in CORE:
        worst = float((got[metric].cpu() - reference[metric]).abs().max())
        if not worst <= tolerances[metric]:
            raise AssertionError(f"{metric} is off by {worst:.1e}, allowed {tolerances[metric]:.0e}")
