"""Which of many hashes are equal, or nearly so, without comparing each with each."""

import numpy as np
from jaxtyping import Int64, UInt64


def near_duplicates(
    hashes: UInt64[np.ndarray, "n words"], rank: Int64[np.ndarray, " n"], limit: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """For each hash the kept one that it is a near duplicate of, or -1 where it is kept; and how many bits differ.

    In order of rank, each is kept unless one that is kept already differs from it in at most `limit` bits. So no two
    that are kept are so close, and nothing is dropped for what it resembles only by way of others.
    """
    equal_order = np.lexsort((rank, *hashes.T))
    equal = np.empty(len(hashes), np.int64)  # the best of those with the same hash
    equal[equal_order] = equal_order[first_of_equals(hashes[equal_order])]
    unique = np.flatnonzero(equal == np.arange(len(hashes)))
    of, distance = np.full(len(hashes), -1), np.zeros(len(hashes), np.int64)

    first, second, apart = close_pairs(hashes[unique], limit)
    first, second = unique[first], unique[second]
    swapped = rank[first] > rank[second]
    better, worse = np.where(swapped, second, first), np.where(swapped, first, second)
    # Of the kept ones that an image is close to, it counts as a duplicate of the closest.
    for pair in np.lexsort((rank[better], apart, rank[worse])):
        if of[worse[pair]] < 0 and of[better[pair]] < 0:
            of[worse[pair]], distance[worse[pair]] = better[pair], apart[pair]

    copies = equal != np.arange(len(hashes))
    dropped_too = copies & (of[equal] >= 0)
    distance[dropped_too] = distance[equal[dropped_too]]
    of[copies] = np.where(of[equal] >= 0, of[equal], equal)[copies]
    return of, distance


def close_pairs(
    hashes: UInt64[np.ndarray, "n words"], limit: int
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """All pairs of hashes that differ in at most `limit` bits: (first, second, bits that differ), first < second.

    Cut into limit + 1 bands of bits, two such hashes agree in at least one band (pigeonhole principle). So only those
    with an equal band are compared: with 13 bands of 20 bits, of 10^8 unrelated hashes about 100 with each.
    """
    octets = hashes.view(np.uint8)
    edges = np.linspace(0, 8 * octets.shape[1], limit + 2).round().astype(int)
    found = [np.zeros((0, 3), np.int64)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        bits = np.unpackbits(octets[:, start // 8 : -(-stop // 8)], axis=1)
        keys = np.packbits(bits[:, start % 8 :][:, : stop - start], axis=1)
        keys = np.ascontiguousarray(np.pad(keys, ((0, 0), (0, -keys.shape[1] % 8)))).view(np.uint64)
        order = np.lexsort(keys.T)
        group = _group_numbers(keys[order])
        end = np.searchsorted(group, group, side="right")
        left = np.arange(len(order))
        for step in range(1, len(order)):  # as often as the largest group has members
            left = left[left + step < end[left]]
            if not len(left):
                break
            one, other = order[left], order[left + step]
            apart = np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1, dtype=np.int64)
            close = apart <= limit
            pair = np.sort(np.stack([one[close], other[close]], axis=1), axis=1)
            found.append(np.column_stack([pair, apart[close]]))
    return tuple(np.unique(np.concatenate(found), axis=0).T)  # a pair may agree in several bands


def first_of_equals(keys: UInt64[np.ndarray, "n words"]) -> Int64[np.ndarray, " n"]:
    """For each row of [n, words] the number of the first row that is the same."""
    order = np.lexsort(keys.T)  # stable: among equals the first comes first
    group = _group_numbers(keys[order])
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.searchsorted(group, group, side="left")]
    return first


def _group_numbers(sorted_keys):
    """0 for the first rows of a sorted [n, words], and one more wherever a row differs from the one before."""
    new = (sorted_keys[1:] != sorted_keys[:-1]).any(axis=1)
    return np.concatenate([[0], np.cumsum(new)])[: len(sorted_keys)]
