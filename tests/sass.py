"""Which matrix product the operands of a multiplication come from, in machine code of sm_90."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

# Operations that pass on where their operands come from; all others give a value of no product.
PASSED_ON = ("FFMA", "FADD", "FMUL", "MUFU", "FMNMX", "FSEL", "MOV", "SHFL", "IMAD.MOV")
WITHOUT_RESULT = ("ST", "LDGSTS", "BAR", "DEPBAR", "WARPGROUP", "BRA", "EXIT", "U", "ISETP", "FSETP", "PLOP3", "S2UR")


def instructions(listing: str) -> list[str]:
    """Of nvdisasm's listing, without predicates."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing)
    return [re.sub(r"^@!?U?P\w+\s+", "", instruction.strip()) for instruction in found]


def multiplied(code: Sequence[str]) -> Counter[tuple[int, int]]:
    """(product, product) -> how many FFMA multiply a value of the one with one of the other, in the order of the code.

    A sum of several products is of none. Branches are not followed: a loop counts as its body, once.
    """
    product, pairs = -1, Counter[tuple[int, int]]()
    registers: dict[int, int | None] = defaultdict(lambda: None)
    stack: dict[int, int | None] = {}
    for instruction in code:
        name, _, rest = instruction.partition(" ")
        arguments = [argument.strip() for argument in rest.split(",")]
        named = [[int(number) for number in re.findall(r"\bR(\d+)\b", argument)] for argument in arguments]
        words = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
        if shape := re.match(r"HGMMA\.64x(\d+)", name):
            product += "RZ" in rest
            registers.update(dict.fromkeys(range(named[0][0], named[0][0] + int(shape[1]) // 2), product))
        elif name.startswith(("STL", "LDL")):
            place = re.search(r"\[R1\+?(0x[0-9a-f]+)?\]", rest)
            assert place is not None
            base, first = int(place[1] or "0", 16), named[-1 if name.startswith("STL") else 0][-1]
            for word in range(words):
                if name.startswith("STL"):
                    stack[base + 4 * word] = registers[first + word]
                else:
                    registers[first + word] = stack.get(base + 4 * word)
        elif name.startswith(PASSED_ON):
            at = 1 if name.startswith("SHFL") else 0
            if not named[at]:
                continue
            sources = [{registers[number] for number in numbers} - {None} for numbers in named[at + 1 :]]
            if name.startswith("FFMA") and sources[0] and sources[1]:
                pairs[min(sources[0] | sources[1]), max(sources[0] | sources[1])] += 1  # type: ignore[type-var]
                registers[named[at][0]] = None
                continue
            of = set[int | None]().union(*sources)
            registers[named[at][0]] = max(of) if 0 < len(of) <= 2 else None  # type: ignore[type-var]
        elif named[0] and not name.startswith(WITHOUT_RESULT):
            registers.update(dict.fromkeys(range(named[0][0], named[0][0] + words), None))
    return pairs
