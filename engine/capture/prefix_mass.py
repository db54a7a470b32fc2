"""Heads whose patches get almost nothing, in one wording for capture, table and report."""

from __future__ import annotations

from collections.abc import Mapping

# A head whose mean prefix mass passes this keeps so little on its patches that 16 bits cost 7e-4 nat and 0.1 of I.
HIGH_PREFIX_MASS = 0.9

_NAMED = 3


def heads_on_prefix(masses: Mapping[str, float]) -> str:
    """The beginning of a sentence on the heads above `HIGH_PREFIX_MASS`, the greatest first; "" if there are none.

    Args:
        masses: name of a head, such as "layer 3, head 1" -> its mean prefix mass; NaN is not high.
    """
    high = sorted(((name, mass) for name, mass in masses.items() if mass > HIGH_PREFIX_MASS), key=lambda head: -head[1])
    if not high:
        return ""
    named = "; ".join(f"{name} ({mass:.3f})" for name, mass in high[:_NAMED])
    count = "1 head" if len(high) == 1 else f"{len(high)} heads"
    most = "" if len(high) <= _NAMED else ", most in"
    more = "" if len(high) <= _NAMED else f"; and {len(high) - _NAMED} more"
    return f"prefix tokens take more than {HIGH_PREFIX_MASS} of the attention of {count}{most or ':'} {named}{more}"
