"""The passes over whole maps for any CPU and float type.

What a map's values are depends on that map alone: not on the batch it came in, nor on the number of threads. float16
and bfloat16 arrive as their bits and are widened a row at a time, so no copy of the input is made. From query and
key, four rows of logits exist at a time, in cache.
"""

# Numba types compiled code: its parameters take no annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np
from numba import njit

from kernels.cpu.cache import called_from_python
from kernels.cpu.math import LOG2_E, OPTIONS, apart, hold, lent, load_row, rescale, sum_double
from kernels.cpu.rows import (
    Planes,
    attention_row,
    checked_row,
    clear_map,
    map_entropy,
    map_morans_i,
    qk_row,
    row_js_divergence,
)


@njit(forceinline=True, **OPTIONS)
def _logits_of_four(q, kt, out):
    """out = q·kᵀ for four queries [4, dim] and all keys kt [dim, token]; dim is a multiple of 4.

    Four queries by four dimensions: 16 products for four loads of keys and four of sums (44 GFLOP/s measured where
    one query at a time reached 24).
    """
    out0, out1, out2, out3 = out[0], out[1], out[2], out[3]
    out[:] = 0
    for i in range(0, kt.shape[0], 4):
        k0, k1, k2, k3 = kt[i], kt[i + 1], kt[i + 2], kt[i + 3]
        a0, a1, a2, a3 = q[0, i], q[0, i + 1], q[0, i + 2], q[0, i + 3]
        b0, b1, b2, b3 = q[1, i], q[1, i + 1], q[1, i + 2], q[1, i + 3]
        c0, c1, c2, c3 = q[2, i], q[2, i + 1], q[2, i + 2], q[2, i + 3]
        d0, d1, d2, d3 = q[3, i], q[3, i + 1], q[3, i + 2], q[3, i + 3]
        for j in range(kt.shape[1]):
            v0, v1, v2, v3 = k0[j], k1[j], k2[j], k3[j]
            out0[j] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
            out1[j] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
            out2[j] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
            out3[j] += d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3


@njit(forceinline=True, **OPTIONS)
def _qk_map(m, queries, keys, kind, factor, bias, shape, tables, needs, out):
    """Map `m` four queries at a time: their logits, softmax and metrics, then the next four.

    `queries` and `keys` are (memory, start, stride, dimensions), `bias` is (memory, start or −1, stride).
    """
    prefix, (offsets, has_right) = shape[0], tables
    patches, dtype = has_right.size, offsets.dtype
    tokens = prefix + patches
    k_buffer, k_start, k_stride, head_dim = keys
    q_buffer, q_start, q_stride, _ = queries
    bias_buffer, bias_start, bias_stride = bias
    log2_e = dtype.type(LOG2_E)
    padded = (head_dim + 3) // 4 * 4
    made = (
        (apart(head_dim, dtype), np.zeros((padded, tokens), dtype)),
        (np.zeros((4, padded), dtype), apart(4 * tokens, dtype).reshape(4, tokens)),
        (apart(prefix, dtype), apart(patches, dtype), apart(patches, dtype)),
    )
    (vector, kt), (four, logits), scratch = lent(made)
    for token in range(tokens):
        load_row(k_buffer, k_start + token * k_stride, kind, vector)
        for i in range(head_dim):
            kt[i, token] = vector[i]
    for begin in range(0, tokens, 4):
        size = min(4, tokens - begin)
        for row in range(size):
            load_row(q_buffer, q_start + (begin + row) * q_stride, kind, vector)
            for i in range(head_dim):
                four[row, i] = vector[i] * factor
        _logits_of_four(four, kt, logits)
        for row in range(size):
            line = logits[row]
            if bias_start >= 0:
                start = bias_start + (begin + row) * bias_stride
                for i in range(tokens):
                    line[i] += bias_buffer[start + i] * log2_e
            qk_row(line, m, begin + row, shape, tables, needs, scratch, out)
    hold(made)


# --- what Python calls: over maps begin … end; memory is (flat array, start of each map, row stride) ------------------
# Arguments that go together travel as tuples as in `rows`; for queries and keys the number of dimensions is the last.


@called_from_python
def attention(maps, kind, shape, tables, tolerance, needs, out, begin, end):
    (buffer, starts, row_stride), near, into = lent(maps), lent(tables), Planes(*lent(out))
    prefix, (offsets, has_right) = shape[0], near
    patches, dtype = has_right.size, offsets.dtype
    made = (apart(prefix, dtype), apart(patches, dtype), apart(patches, dtype))
    scratch = lent(made)
    for m in range(begin, end):
        clear_map(m, needs, into)
        for q in range(prefix + patches):
            at = starts[m] + q * row_stride
            attention_row(buffer, at, kind, m, q, shape, near, tolerance, needs, scratch, into)
    hold(made)


@called_from_python
def qk(queries, keys, kind, scale, bias, shape, tables, needs, out, begin, end):
    of_queries, of_keys, added = lent(queries), lent(keys), lent(bias)
    near, into = lent(tables), Planes(*lent(out))
    factor = near[0].dtype.type(scale * LOG2_E)  # logits in binary logarithms, for 2^t
    for m in range(begin, end):
        clear_map(m, needs, into)
        of_query = (of_queries[0], of_queries[1][m], of_queries[2], of_queries[3])
        of_key = (of_keys[0], of_keys[1][m], of_keys[2], of_keys[3])
        of_bias = (added[0], added[1][m] if added[1].size > 0 else -1, added[2])
        _qk_map(m, of_query, of_key, kind, factor, of_bias, shape, near, needs, into)


@called_from_python
def pair(one, two, kind, prefix, tolerance, js, valid, begin, end):
    """Every row of every map in two conditions: js [map, patch query], valid [map, query]."""
    patches = js.shape[1]
    (one_buffer, one_starts, one_stride), (two_buffer, two_starts, two_stride) = lent(one), lent(two)
    made = (apart(prefix, js.dtype), apart(patches, js.dtype), apart(patches, js.dtype))
    head, x, y = lent(made)
    for m in range(begin, end):
        for q in range(prefix + patches):
            at = one_starts[m] + q * one_stride
            _, one_total, one_valid = checked_row(one_buffer, at, kind, head, x, tolerance)
            at = two_starts[m] + q * two_stride
            _, two_total, two_valid = checked_row(two_buffer, at, kind, head, y, tolerance)
            if not (one_valid and two_valid):
                valid[m, q] = False
            elif q >= prefix and one_total > 0 and two_total > 0:
                if one_total < 1e-3:
                    one_total = rescale(x, one_total)
                if two_total < 1e-3:
                    two_total = rescale(y, two_total)
                js[m, q - prefix] = row_js_divergence(x, one_total, y, two_total)
    hold(made)


@called_from_python
def maps_morans_i(maps, has_right, grid_cols, num_edges, out):
    """Moran's I of float64 maps [map, patch]; NaN where constant or undefined."""
    z = apart(maps.shape[1], maps.dtype)
    for m in range(maps.shape[0]):
        out[m] = map_morans_i(maps[m], z, has_right, grid_cols, num_edges)


@called_from_python
def maps_entropy(maps, out):
    """Entropy in nat of float64 maps [map, patch]; NaN where undefined."""
    for m in range(maps.shape[0]):
        out[m] = map_entropy(maps[m])


@called_from_python
def row_sums(rows, out):
    """Sums of [row, value] in float64: NaN where a value is. 57 µs of NumPy for 576 rows of 196 are 16 here."""
    for i in range(rows.shape[0]):
        out[i] = sum_double(rows[i])
