# pragma version 0.4.3
# pragma evm-version cancun
"""
@title Checkpoints of one casemate log
@notice Keeps the tree heads (RFC 6962) that one account posts, and says whether a receipt stands in
    the log under one of them. A head can never be changed, and each must extend the one before it.
@dev No signature is checked here: neither the log's Ed25519 key nor an enclave's evidence. Who
    trusts a root of this contract trusts its poster; see docs/anchors.md.
"""

# A job's commit entry (log-commit/v2 within entry/v2), as far as it is not fixed text.
struct Commit:
    boot: bytes16
    job: bytes16
    anchor: int256  # -1 where the entry says null
    result: bytes32  # the commitment to the result


event Posted:
    size: indexed(uint256)
    root: bytes32


MAX_SIZE: constant(uint256) = 2**53
MAX_PATH: constant(uint256) = 63
MAX_ENTRY: constant(uint256) = 8192
WORDS: constant(uint256) = 14  # of 24 bytes each, for the longest body of a commit entry
MAX_BODY: constant(uint256) = 336
MAX_TEXT: constant(uint256) = 448  # the same in base64

poster: public(immutable(address))
log_key: public(immutable(bytes32))  # whose log this is: its Ed25519 key

size: public(uint256)
roots: public(HashMap[uint256, bytes32])


@deploy
def __init__(poster_: address, log_key_: bytes32):
    # A chain without the precompiled SHA-256 would answer every call with its input.
    zero: bytes32 = empty(bytes32)
    assert (
        sha256(zero) == 0x66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925
    ), "this chain has no SHA-256"
    poster = poster_
    log_key = log_key_


@external
def post(size: uint256, root: bytes32, proof: DynArray[bytes32, MAX_PATH]):
    """
    @notice Keep the head of a log that has grown.
    @param size How many entries it now has; more than at the last post.
    @param root The root over them.
    @param proof That it extends the last head (RFC 9162, 2.1.4); nothing at the first post.
    """
    assert msg.sender == poster, "only the poster posts"
    assert size > self.size, "the log has not grown"
    assert size <= MAX_SIZE, "the log is too large"
    assert root != empty(bytes32), "the root is empty"
    if self.size == 0:
        assert len(proof) == 0, "the proof is too long"
    else:
        self._check_extends(self.size, self.roots[self.size], size, root, proof)
    self.size = size
    self.roots[size] = root
    log Posted(size=size, root=root)


@external
@view
def verify_receipt(
    receipt: bytes32,
    salt: bytes32,
    commit: Commit,
    index: uint256,
    size: uint256,
    path: DynArray[bytes32, MAX_PATH],
) -> bool:
    """
    @notice True if the log of `size` entries commits at `index` to the receipt whose envelope has
        this SHA-256; reverts with the reason otherwise.
    @dev The entry is written anew from its parts, each of one width, so nothing is parsed: it is
        the log's own entry or has another hash.
    """
    return self._stands(self._leaf(receipt, salt, commit, index), index, size, path)


@external
@view
def verify_entry(
    entry: Bytes[MAX_ENTRY], index: uint256, size: uint256, path: DynArray[bytes32, MAX_PATH]
) -> bool:
    """
    @notice True if these are the bytes of the log's entry at `index`; reverts with the reason
        otherwise. What the entry says is not looked at.
    """
    return self._stands(sha256(concat(x"00", entry)), index, size, path)


# Trees: RFC 6962 section 2.1, checked as RFC 9162 section 2.1 says.


@internal
@pure
def _node(left: bytes32, right: bytes32) -> bytes32:
    return sha256(concat(x"01", left, right))


@internal
@view
def _stands(
    leaf: bytes32, index: uint256, size: uint256, path: DynArray[bytes32, MAX_PATH]
) -> bool:
    """RFC 9162, 2.1.3.2."""
    root: bytes32 = self.roots[size]
    assert root != empty(bytes32), "no head of this size was posted"
    assert index < size, "the index is past the log's end"
    at: uint256 = index
    last: uint256 = size - 1
    found: bytes32 = leaf
    for sibling: bytes32 in path:
        assert last != 0, "the path is too long"
        if at & 1 == 1 or at == last:
            found = self._node(sibling, found)
            for _: uint256 in range(MAX_PATH):
                if at & 1 == 1:
                    break
                at >>= 1
                last >>= 1
        else:
            found = self._node(found, sibling)
        at >>= 1
        last >>= 1
    assert last == 0, "the path is too short"
    assert found == root, "the path leads to another root"
    return True


@internal
@pure
def _check_extends(
    old: uint256,
    old_root: bytes32,
    size: uint256,
    root: bytes32,
    proof: DynArray[bytes32, MAX_PATH],
):
    """RFC 9162, 2.1.4.2, for 0 < old < size."""
    at: uint256 = old - 1
    last: uint256 = size - 1
    before: bytes32 = old_root
    first: uint256 = 0
    if old & at != 0:  # no power of two
        assert len(proof) != 0, "the proof is too short"
        before = proof[0]
        first = 1
    for _: uint256 in range(MAX_PATH):
        if at & 1 == 0:
            break
        at >>= 1
        last >>= 1
    after: bytes32 = before
    for i: uint256 in range(first, len(proof), bound=MAX_PATH):
        assert last != 0, "the proof is too long"
        if at & 1 == 1 or at == last:
            before = self._node(proof[i], before)
            after = self._node(proof[i], after)
            for _: uint256 in range(MAX_PATH):
                if at == 0 or at & 1 == 1:
                    break
                at >>= 1
                last >>= 1
        else:
            after = self._node(after, proof[i])
        at >>= 1
        last >>= 1
    assert last == 0, "the proof is too short"
    assert before == old_root, "the proof leads to another old root"
    assert after == root, "the proof leads to another new root"


# The commit entry of docs/ledger.md, byte for byte.


@internal
@pure
def _leaf(receipt: bytes32, salt: bytes32, commit: Commit, index: uint256) -> bytes32:
    """The hash of the entry that commits to this receipt (spec.log.commitment), as a leaf."""
    opened: bytes32 = sha256(
        concat(b"casemate/log/v1\x00", salt, b"sha256:", self._hex(receipt))
    )
    job: Bytes[32] = slice(self._hex(convert(commit.job, bytes32)), 0, 32)
    anchor: Bytes[78] = b"null"
    if commit.anchor != -1:
        anchor = convert(uint2str(convert(commit.anchor, uint256)), Bytes[78])
    body: Bytes[MAX_BODY] = concat(
        b'{"anchor":', anchor, b',"job":"job_', job,
        b'","receipt":"sha256:', self._hex(opened),
        b'","result":"sha256:', self._hex(commit.result), b'","type":"log-commit/v2"}',
    )
    boot: Bytes[MAX_BODY] = concat(commit.boot, b"")
    return sha256(
        concat(
            x"00", b'{"body":"', self._base64(body), b'","boot":"', self._base64(boot),
            b'","kind":"commit","sequence":', convert(uint2str(index), Bytes[78]),
            b',"subject":"job_', job, b'","type":"entry/v2"}',
        )
    )


ALL: constant(uint256) = max_value(uint256)
ONES: constant(uint256) = ALL // 255  # 1 in each byte


@internal
@pure
def _hex(word: bytes32) -> Bytes[64]:
    """Lower-case digits."""
    both: uint256 = convert(word, uint256)
    return concat(self._hex16(both >> 128), self._hex16(both & (2**128 - 1)))


@internal
@pure
def _hex16(bits: uint256) -> bytes32:
    """The digits of 16 bytes, in halves that are moved apart until each byte holds one digit."""
    x: uint256 = self._apart(bits, 2**64 - 1, 64)
    x = self._apart(x, (2**32 - 1) * (ALL // (2**128 - 1)), 32)
    x = self._apart(x, (2**16 - 1) * (ALL // (2**64 - 1)), 16)
    x = self._apart(x, (2**8 - 1) * (ALL // (2**32 - 1)), 8)
    x = self._apart(x, (2**4 - 1) * (ALL // (2**16 - 1)), 4)
    # 0-9 from 48, a-f from 97
    return convert(x + 48 * ONES + 39 * self._least(x, 10), bytes32)


@internal
@pure
def _base64(data: Bytes[MAX_BODY]) -> Bytes[MAX_TEXT]:
    """Base64url without padding (RFC 4648, section 5), 24 bytes to 32 characters at a time."""
    padded: Bytes[MAX_BODY + 32] = concat(data, empty(bytes32))
    words: bytes32[WORDS] = empty(bytes32[WORDS])
    for i: uint256 in range(WORDS):
        if 24 * i >= len(data):
            break
        words[i] = self._base64word(convert(extract32(padded, 24 * i), uint256) >> 64)
    return slice(abi_encode(words), 0, (4 * len(data) + 2) // 3)


@internal
@pure
def _base64word(bits: uint256) -> bytes32:
    """The characters of 24 bytes, as in `_hex16`: 6 bits for each."""
    x: uint256 = self._apart(bits, 2**96 - 1, 32)
    x = self._apart(x, (2**48 - 1) * (ALL // (2**128 - 1)), 16)
    x = self._apart(x, (2**24 - 1) * (ALL // (2**64 - 1)), 8)
    x = self._apart(x, (2**12 - 1) * (ALL // (2**32 - 1)), 4)
    x = self._apart(x, (2**6 - 1) * (ALL // (2**16 - 1)), 2)
    # A-Z from 65, a-z from 97, 0-9 from 48, - is 45, _ is 95
    above: uint256 = 6 * self._least(x, 26) + 49 * self._least(x, 63)
    below: uint256 = 75 * self._least(x, 52) + 13 * self._least(x, 62)
    return convert(x + 65 * ONES + above - below, bytes32)


@internal
@pure
def _apart(x: uint256, low: uint256, by: uint256) -> uint256:
    """The bits of `low` stay, the others move up."""
    return x & low | (x & ~low) << by


@internal
@pure
def _least(x: uint256, low: uint256) -> uint256:
    """1 in each byte of `x` (all below 64) that is at least `low`."""
    return (x + (128 - low) * ONES) >> 7 & ONES
