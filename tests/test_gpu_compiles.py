"""Triton's kernels through its compiler to machine code, which takes no device."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kernels.backends import BACKENDS
from tests.cases import layout
from tests.sass import instructions, multiplied

# Grids of ViTs with 8, 14, 24 and 37 patches a side.
SIDES = (8, 14, 24, 37)
POINTERS = {"starts": "*i64", "planes": "*fp32", "valid": "*i8", "again": "*i8"}
FLOATS = dict.fromkeys(("tolerance", "factor", "row_step", "col_step"), "fp32")


def geometry(side: int, needs: int) -> dict[str, Any]:
    edges = 2 * side * (side - 1)
    return {"PREFIX": 1, "GRID_ROWS": side, "GRID_COLS": side, "NUM_EDGES": edges, "NEEDS": needs}


@pytest.mark.skipif("cpu" in BACKENDS["triton"].readable_devices, reason="an interpreter compiles nothing")
class TestTritonCompiles:
    """Through to machine code, which takes no device: the interpreter lets pass what the compiler refuses.

    As they are launched, no kernel may spill registers to memory: it would be slower by a multiple.
    """

    @staticmethod
    def compiled(
        kernel: Any, constants: dict[str, Any], types: dict[str, str], options: dict[str, int], aligned: tuple[str, ...]
    ) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = kernel.arg_names
        given = {**POINTERS, **FLOATS, **types}
        signature = {name: "constexpr" if name in constants else given.get(name, "i32") for name in names}
        known = [name for name in names if signature[name].startswith("*") or name in aligned]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in known},
        )
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    @staticmethod
    def spilled(binary: Any, tmp_path: Path) -> int:
        """Bytes of local memory a thread."""
        from triton import knobs

        path = tmp_path / "kernel.cubin"
        path.write_bytes(binary.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return sum(int(found) for found in re.findall(r"(?:STACK|LOCAL):(\d+)", said))

    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def from_maps(self, side: int, dtype: str, needs: int, tmp_path: Path) -> int:
        from kernels.cuda import triton_gpu, triton_maps

        constants = {
            **geometry(side, needs),
            **triton_gpu._maps_tile(side, side),
            "WORDS": dtype != "fp32",
            "IS_SHORT": dtype != "fp32",
            "IS_BFLOAT16": dtype == "bf16",
            "FAST": True,
            "stride_k": 1,
        }
        types = {"attention": "*i16" if dtype == "bf16" else f"*{dtype}"}
        options = {"num_warps": triton_gpu.MAPS_WARPS}
        return self.spilled(self.compiled(triton_maps.attention_rows, constants, types, options, ()), tmp_path)

    def from_qk(self, rows: int, cols: int, dtype: str, bias: str, **chosen: Any) -> Any:
        from kernels.cuda import triton_gpu, triton_qk

        tile = triton_gpu._qk_tile(layout(rows, cols, 1), 4 if dtype == "fp32" else 2, bool(bias)) | chosen
        options = {name: tile.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in tile}
        constants = {
            **geometry(rows, 7),
            **{"GRID_COLS": cols, "NUM_EDGES": layout(rows, cols, 1).num_edges},
            **tile,
            "BLOCK_P": 16,
            "HEAD_DIM": 64,
            "BLOCK_D": 64,
            "HAS_BIAS": bool(bias),
            "IS_MASK": bias == "i8",
            "NEGATE": False,
            "WIDEN": False,
            "FAST": True,
            "ALIGNED": 16,
            "stride_qd": 1,
            "stride_kd": 1,
            "stride_bk": 1,
        }
        types = dict.fromkeys(("q_starts", "k_starts", "b_starts"), "*i64")
        types |= {"query": f"*{dtype}", "key": f"*{dtype}", "bias": f"*{bias or dtype}"}
        binary = self.compiled(triton_qk.qk_rows, constants, types, options, ("stride_qn", "stride_kn", "stride_bq"))
        assert binary.metadata.shared <= 99 * 2**10  # what an sm_86 offers; sm_90 has 227 KB
        return binary

    @pytest.mark.parametrize(
        ("side", "dtype", "needs"), [(14, "fp16", 7), (24, "bf16", 7), (37, "fp32", 7), (14, "fp16", 15)]
    )
    def test_from_stored_maps(self, side: int, dtype: str, needs: int, tmp_path: Path) -> None:
        assert self.from_maps(side, dtype, needs, tmp_path) == 0

    @pytest.mark.parametrize(("side", "dtype", "bias"), [(14, "bf16", ""), (24, "fp16", "i8"), (14, "fp32", "")])
    def test_from_query_and_key(self, side: int, dtype: str, bias: str, tmp_path: Path) -> None:
        # Constants outside the loop over keys; float32 factors are split in three.
        binary = self.from_qk(side, side, dtype, bias, FLAT=False)
        assert self.spilled(binary, tmp_path) <= (256 if dtype == "fp32" else 160)

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
    @pytest.mark.parametrize("side", SIDES)
    def test_every_grid_and_type(self, side: int, dtype: str, tmp_path: Path) -> None:
        assert self.from_maps(side, dtype, 7, tmp_path) == 0
        binary = self.from_qk(side, side, dtype, "", FLAT=False)
        assert self.spilled(binary, tmp_path) <= (1024 if dtype == "fp32" else 320)

    def test_queries_of_two_maps_in_one_program(self, tmp_path: Path) -> None:
        """A third of the programs at 197 tokens: they may spill, so that four of the others run at once."""
        assert self.spilled(self.from_qk(14, 14, "bf16", "", FLAT=True), tmp_path) <= 256

    @pytest.mark.parametrize(
        ("rows", "cols", "chosen"),
        [
            (5, 13, {"FLAT": False, "AT_ONCE": 1}),
            (8, 8, {"FLAT": False, "AT_ONCE": 1}),
            (6, 12, {"FLAT": True, "AT_ONCE": 2, "NEEDS": 15}),
        ],
    )
    def test_the_row_above_is_the_row_before(
        self, rows: int, cols: int, chosen: dict[str, Any], tmp_path: Path
    ) -> None:
        """Also where ptxas writes out the loop over the rows of the grid, and moves values from one to the next."""
        from triton import knobs

        path = tmp_path / "kernel.cubin"
        path.write_bytes(self.from_qk(rows, cols, "bf16", "", **chosen).asm["cubin"])
        said = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", path], capture_output=True, text=True, check=True)
        pairs = multiplied(instructions(said.stdout))
        adjacent = {pair: count for pair, count in pairs.items() if pair[1] == pair[0] + 1}
        assert all(8 <= count <= 12 for count in adjacent.values()), dict(pairs)  # four pairs of columns a thread
        # Each product of rows but the first of a pass; rows done again are another pass, programs of two maps two more.
        products = sum(20 <= count <= 100 for (one, other), count in pairs.items() if one == other)
        assert len(adjacent) == products - (4 if chosen["FLAT"] else 2), dict(pairs)

    @pytest.mark.parametrize("dtype", ["fp16", "bf16"])
    def test_rows_done_again_and_means(self, dtype: str, tmp_path: Path) -> None:
        from kernels.cuda import triton_maps, triton_rows

        constants = {**geometry(37, 15), "BLOCK_P": 1, "BLOCK_K": 2048, "BLOCK_T": 2048, "stride_k": 1}
        constants["IS_BFLOAT16"] = dtype == "bf16"
        types = {"attention": "*i16" if dtype == "bf16" else f"*{dtype}"}
        assert (
            self.spilled(self.compiled(triton_maps.exact_rows, constants, types, {"num_warps": 4}, ()), tmp_path) == 0
        )
        types = dict.fromkeys(("first", "second", "third", "fourth"), "*fp32")
        types |= {"means": "*fp64", "counts": "*i64"}
        constants = {"PREFIX": 5, "QUERIES": 1369, "BLOCK": 2048, "BLOCK_P": 8, "query_stride": 1}
        binary = self.compiled(triton_rows.means_of_rows, constants, types, {"num_warps": 4}, ())
        assert self.spilled(binary, tmp_path) == 0
