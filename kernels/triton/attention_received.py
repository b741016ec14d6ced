"""The attention that keys receive from the last queries: what FlashAttention computes and never stores.

Two passes over the keys. The first finds each query's log-sum-exp over each block of keys; what they are over all keys
is a sum of few numbers. The second adds up a key's probabilities over the queries. No logits leave a program.
"""

import triton
import triton.language as tl

from .elements import elements

_NUMBERS = [
    "query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row", "groups", "count", "rows", "tokens",
    "channels",
]  # fmt: skip


@triton.jit
def _load_keys(
    keys, key_batch, key_head, key_row, batch, group, key, tokens, channels, DEPTH: tl.constexpr, VECTOR: tl.constexpr
):
    depth = tl.arange(0, DEPTH)
    keys += batch * elements(key_batch, VECTOR) + group * elements(key_head, VECTOR)
    at = keys + key[None, :] * elements(key_row, VECTOR) + depth[:, None]
    return tl.load(at, mask=(key < tokens)[None, :] & (depth < elements(channels, VECTOR))[:, None], other=0.0)


@triton.jit
def _logits(
    queries, query_batch, query_head, query_row, batch, group, row, rows, count, block, key, tokens, channels, scale,
    DEPTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Of rows of a group (head by head, query by query) and a block of keys; -inf for what is not seen."""
    depth = tl.arange(0, DEPTH)
    present = row < rows
    head, query = group * (rows // count) + row // count, row % count
    queries += batch * elements(query_batch, VECTOR)
    first = head * elements(query_head, VECTOR) + query * elements(query_row, VECTOR)
    at = queries + first[:, None] + depth[None, :]
    inside = present[:, None] & (depth < elements(channels, VECTOR))[None, :]
    logits = tl.dot(tl.load(at, mask=inside, other=0.0), block, input_precision="ieee") * scale
    seen = present[:, None] & (key[None, :] <= (tokens - count + query)[:, None])
    return tl.where(seen, logits, float("-inf"))


@triton.jit(do_not_specialize=[*_NUMBERS, "scale"])
def sum_blocks(
    queries, keys, sums,
    query_batch: tl.int64, query_head: tl.int64, query_row: tl.int64, key_batch: tl.int64, key_head: tl.int64,
    key_row: tl.int64, groups: tl.int32, count: tl.int32, rows: tl.int32, tokens: tl.int32, channels: tl.int32,
    scale: tl.float32,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (batch and group, block of keys): sums [B * G, rows, blocks], each row's log-sum-exp over the block."""
    blocks = tl.cdiv(tokens, KEYS)
    member, number = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, group = (member // groups).to(tl.int64), (member % groups).to(tl.int64)
    key = number * KEYS + tl.arange(0, KEYS)
    block = _load_keys(keys, key_batch, key_head, key_row, batch, group, key, tokens, channels, DEPTH, VECTOR)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        logits = _logits(
            queries, query_batch, query_head, query_row, batch, group, row, rows, count, block, key, tokens, channels,
            scale, DEPTH, VECTOR,
        )  # fmt: skip
        most = tl.max(logits, 1)
        seen = tl.where(most == float("-inf"), 0.0, most)
        total = tl.sum(tl.exp(logits - seen[:, None]), 1)
        total = most + tl.log(tl.where(most == float("-inf"), 1.0, total))
        tl.store(sums + (member.to(tl.int64) * rows + row) * blocks + number, total, mask=row < rows)


@triton.jit(do_not_specialize=[*_NUMBERS, "scale"])
def add_probabilities(
    queries, keys, sums, parts,
    query_batch: tl.int64, query_head: tl.int64, query_row: tl.int64, key_batch: tl.int64, key_head: tl.int64,
    key_row: tl.int64, groups: tl.int32, count: tl.int32, rows: tl.int32, tokens: tl.int32, channels: tl.int32,
    scale: tl.float32,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DEPTH: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The same program: parts [B * G, tokens], the sum of a key's probabilities; sums [B * G, rows] over all keys."""
    blocks = tl.cdiv(tokens, KEYS)
    member, number = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, group = (member // groups).to(tl.int64), (member % groups).to(tl.int64)
    key = number * KEYS + tl.arange(0, KEYS)
    block = _load_keys(keys, key_batch, key_head, key_row, batch, group, key, tokens, channels, DEPTH, VECTOR)
    acc = tl.zeros([KEYS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        logits = _logits(
            queries, query_batch, query_head, query_row, batch, group, row, rows, count, block, key, tokens, channels,
            scale, DEPTH, VECTOR,
        )  # fmt: skip
        total = tl.load(sums + member.to(tl.int64) * rows + row, mask=row < rows, other=0.0)
        acc += tl.sum(tl.exp(logits - total[:, None]), 0)
    tl.store(parts + member.to(tl.int64) * tokens + key, acc, mask=key < tokens)
