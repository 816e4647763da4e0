"""The primitives of secure aggregation: the RFCs' vectors, naive twins, what must be refused."""

import hashlib
import hmac
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baffle.errors import ConfigError, SecurityError
from baffle.secagg.primitives import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    TAG_BYTES,
    Identity,
    KeyPair,
    derive,
    hash_of,
    hkdf,
    mask,
    open_sealed,
    random_bytes,
    seal,
    verify,
)

h = bytes.fromhex
keys = st.binary(min_size=32, max_size=32)
labels = st.lists(st.binary(max_size=12) | st.integers(0, 2**64 - 1), max_size=5)


# HKDF

# RFC 5869, A.1 to A.3: secret, salt, info, output.
HKDF = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
        "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
        "cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("secret", "salt", "info", "output"), HKDF, ids=["A.1", "A.2", "A.3"])
def test_hkdf_has_the_answers_of_RFC_5869(secret, salt, info, output):
    assert hkdf(h(secret), h(info), len(output) // 2, h(salt)).hex() == output


def test_hkdf_has_an_end():
    assert len(hkdf(b"", b"", 255 * 32)) == 255 * 32
    assert hkdf(b"", b"", 0) == b""
    for length in (-1, 255 * 32 + 1):
        with pytest.raises(ConfigError, match="at most 8160 bytes"):
            hkdf(b"", b"", length)


def spelled_out(parts):
    """The encoding of parts, part by part."""
    out = b""
    for part in parts:
        data = struct.pack("<Q", part) if isinstance(part, int) else part
        out += struct.pack("<I", len(data)) + data
    return out


@given(keys, labels)
def test_derive_is_one_block_of_expand(key, parts):
    assert derive(key, *parts) == hmac.new(key, spelled_out(parts) + b"\1", hashlib.sha256).digest()


@given(labels)
def test_a_hash_is_over_every_part_and_its_length(parts):
    assert hash_of(*parts) == hashlib.sha256(b"baffle secagg v1" + spelled_out(parts)).digest()


@given(labels, labels)
def test_other_parts_are_another_hash(one, other):
    def as_bytes(parts):
        return [part.to_bytes(8, "little") if isinstance(part, int) else part for part in parts]

    same = as_bytes(one) == as_bytes(other)
    assert (hash_of(*one) == hash_of(*other)) is same
    assert (derive(bytes(32), *one) == derive(bytes(32), *other)) is same


def test_an_integer_that_has_no_8_bytes_is_no_part():
    for number in (-1, 1 << 64):
        with pytest.raises(OverflowError):
            hash_of(number)


def test_derivations_are_frozen():
    key = bytes(range(32))
    assert derive(key, b"mask", 7, b"").hex() == (
        "6d75c2a671053060c0b6c6478751b60455991d35af232193bb08654ee1e4a91b"
    )
    assert hash_of(b"round", 3, key).hex() == (
        "30c0f3cb2b36a2f84ce2c9b007eb1be0ea4da4d9e2cfabf29b566c04b6328339"
    )


# Keys

# RFC 7748, 5.2: scalar, u, output.
LADDER = [
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
    (
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ),
]
# RFC 7748, 6.1.
ALICE = h("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
ALICE_PUBLIC = h("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
BOB = h("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
BOB_PUBLIC = h("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
SHARED = h("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")


def agreed(output, one, other):
    """The docstring of ``agree`` on an X25519 output, with the standard library."""
    low, high = sorted((one, other))
    prk = hmac.new(bytes(32), output, hashlib.sha256).digest()
    info = spelled_out([b"baffle secagg v1 agree", low, high])
    return hmac.new(prk, info + b"\1", hashlib.sha256).digest()


@pytest.mark.parametrize(("scalar", "u", "output"), LADDER)
def test_agreement_stands_on_the_ladder_of_RFC_7748(scalar, u, output):
    pair = KeyPair.from_bytes(h(scalar))
    assert pair.agree(h(u)) == agreed(h(output), pair.public, h(u))


def test_two_pairs_agree_as_in_RFC_7748():
    alice, bob = KeyPair.from_bytes(ALICE), KeyPair.from_bytes(BOB)
    assert (alice.public, bob.public) == (ALICE_PUBLIC, BOB_PUBLIC)
    assert alice.agree(bob.public) == bob.agree(alice.public) == agreed(SHARED, ALICE_PUBLIC, BOB_PUBLIC)
    assert (alice.to_bytes(), bob.to_bytes()) == (ALICE, BOB)


# Points whose order divides 8, and their twins beyond p: X25519 gives 0 for all of them.
SMALL_ORDER = [
    (0).to_bytes(32, "little"),
    (1).to_bytes(32, "little"),
    h("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    h("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


@pytest.mark.parametrize("public", SMALL_ORDER, ids=range(len(SMALL_ORDER)))
def test_keys_that_make_every_secret_zero_are_refused(public):
    with pytest.raises(SecurityError, match="small order"):
        KeyPair.generate().agree(public)


def test_what_is_no_key_is_refused():
    pair = KeyPair.generate()
    for public in (b"", bytes(31), bytes(33)):
        with pytest.raises(SecurityError, match="a key is 32 bytes"):
            pair.agree(public)
        with pytest.raises(SecurityError, match="a key is 32 bytes"):
            KeyPair.from_bytes(public)
        with pytest.raises(SecurityError, match="a key is 32 bytes"):
            Identity.from_bytes(public)
    with pytest.raises(SecurityError, match="its own public key"):
        pair.agree(pair.public)


def test_another_writing_of_a_public_key_is_another_agreement():
    """X25519 ignores the highest bit; the keys in the info do not, so who was told otherwise is alone."""
    alice, bob = KeyPair.from_bytes(ALICE), KeyPair.from_bytes(BOB)
    twin = ALICE_PUBLIC[:31] + bytes((ALICE_PUBLIC[31] | 0x80,))
    assert bob.agree(twin) == agreed(SHARED, twin, BOB_PUBLIC) != alice.agree(bob.public)


def test_fresh_keys_differ_and_come_back():
    assert len({KeyPair.generate().public for _ in range(20)}) == 20
    assert len({Identity.generate().public for _ in range(20)}) == 20
    for kind in (KeyPair, Identity):
        made = kind.generate()
        assert kind.from_bytes(made.to_bytes()).public == made.public
        assert len(made.public) == len(made.to_bytes()) == KEY_BYTES
        assert made.to_bytes().hex() not in repr(made)


def test_secrets_come_from_the_operating_system(monkeypatch):
    asked = []
    monkeypatch.setattr("os.urandom", lambda n: asked.append(n) or bytes(range(n)))
    assert random_bytes(5) == bytes(range(5))
    assert KeyPair.generate().to_bytes() == Identity.generate().to_bytes() == bytes(range(32))
    assert asked == [5, 32, 32]


# Signatures

# RFC 8032, 7.1, TEST 1 to 3: secret, public, message, signature.
SIGNED = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555"
        "fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da0"
        "85ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac1"
        "8ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("secret", "public", "message", "signature"), SIGNED, ids=["1", "2", "3"])
def test_signatures_are_those_of_RFC_8032(secret, public, message, signature):
    identity = Identity.from_bytes(h(secret))
    assert identity.public.hex() == public
    assert identity.sign(h(message)).hex() == signature
    assert len(h(signature)) == SIGNATURE_BYTES
    assert verify(h(public), h(signature), h(message))


def test_one_other_bit_and_nobody_signed_it():
    identity, message = Identity.generate(), b"survivors: all"
    signature = identity.sign(message)
    for part, parts in (("public", identity.public), ("signature", signature), ("message", message)):
        for bit in range(8 * len(parts)):
            other = bytearray(parts)
            other[bit // 8] ^= 1 << bit % 8
            given_ = {"public": identity.public, "signature": signature, "message": message}
            assert not verify(**{**given_, part: bytes(other)}), (part, bit)


def test_what_is_no_key_or_signature_verifies_nothing():
    identity = Identity.generate()
    signature = identity.sign(b"")
    assert verify(identity.public, signature, b"")
    assert not verify(Identity.generate().public, signature, b"")
    for public in (b"", identity.public[:31], identity.public + b"\0", b"\xff" * 32):
        assert not verify(public, signature, b"")
    for other in (b"", signature[:63], signature + b"\0", bytes(64), b"\xff" * 64):
        assert not verify(identity.public, other, b"")
    # S + L is the same number modulo the group's order: RFC 8032, 5.1.7 has it refused.
    order = 2**252 + 27742317777372353535851937790883648493
    s = int.from_bytes(signature[32:], "little") + order
    assert not verify(identity.public, signature[:32] + s.to_bytes(32, "little"), b"")


# Sealed messages

SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen "
    b"would be it."
)
# RFC 8439, 2.8.2.
SEALED = h(
    "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b"
    "1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
    "3ff4def08e4b7a9de576d26586cec64b6116"
    "1ae10b594f09e26a7e902ecbd0600691"
)
SEAL_KEY = bytes(range(0x80, 0xA0))
SEAL_NONCE = int.from_bytes(h("070000004041424344454647"), "little")
SEAL_DATA = h("50515253c0c1c2c3c4c5c6c7")


def test_seals_are_those_of_RFC_8439():
    assert seal(SEAL_KEY, SEAL_NONCE, SUNSCREEN, SEAL_DATA) == SEALED
    assert open_sealed(SEAL_KEY, SEAL_NONCE, SEALED, SEAL_DATA) == SUNSCREEN
    assert len(SEALED) == len(SUNSCREEN) + TAG_BYTES


@given(keys, st.integers(0, 2**96 - 1), st.binary(max_size=99), st.binary(max_size=99))
def test_what_was_sealed_opens(key, nonce, plaintext, associated):
    assert open_sealed(key, nonce, seal(key, nonce, plaintext, associated), associated) == plaintext


def test_a_seal_opens_only_in_its_place():
    def refused(key=SEAL_KEY, nonce=SEAL_NONCE, sealed=SEALED, associated=SEAL_DATA):
        with pytest.raises(SecurityError, match="did not seal for this place"):
            open_sealed(key, nonce, sealed, associated)

    refused(key=bytes(32))
    refused(nonce=SEAL_NONCE + 1)
    refused(associated=SEAL_DATA + b"\0")
    refused(associated=b"")
    for length in (0, TAG_BYTES - 1, TAG_BYTES, len(SEALED) - 1):
        refused(sealed=SEALED[:length])
    for bit in range(0, 8 * len(SEALED), 5):
        other = bytearray(SEALED)
        other[bit // 8] ^= 1 << bit % 8
        refused(sealed=bytes(other))
    with pytest.raises(SecurityError, match="a key is 32 bytes"):
        open_sealed(bytes(16), 0, SEALED, b"")


# Masks


def rotated(a, by):
    return (a << by | a >> 32 - by) & 0xFFFFFFFF


def quarter_round(x, a, b, c, d):
    """RFC 8439, 2.1."""
    for p, q, r, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        x[p] = (x[p] + x[q]) & 0xFFFFFFFF
        x[r] = rotated(x[r] ^ x[p], by)


def chacha20(key, blocks):
    """RFC 8439, 2.3 and 2.4 with nonce 0, on Python integers."""
    stream = b""
    for counter in range(blocks):
        start = [*struct.unpack("<4I", b"expand 32-byte k"), *struct.unpack("<8I", key), counter, 0, 0, 0]
        x = list(start)
        for _ in range(10):
            for j in range(4):
                quarter_round(x, j, 4 + j, 8 + j, 12 + j)
            for j in range(4):
                quarter_round(x, j, 4 + (j + 1) % 4, 8 + (j + 2) % 4, 12 + (j + 3) % 4)
        stream += struct.pack("<16I", *((a + b) & 0xFFFFFFFF for a, b in zip(x, start, strict=True)))
    return stream


def test_the_naive_twin_turns_a_quarter_as_RFC_8439_does():
    x = [0x11111111, 0x01020304, 0x9B8D6F43, 0x01234567]
    quarter_round(x, 0, 1, 2, 3)
    assert x == [0xEA2A92F4, 0xCB1CF8CE, 0x4581472E, 0x5881C4BB]


# RFC 8439, A.1, test vectors 1 to 4: key, block, key stream.
STREAMS = [
    (
        "00" * 32,
        0,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        "00" * 32,
        1,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        "00" * 31 + "01",
        1,
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        "00ff" + "00" * 30,
        2,
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
]


@pytest.mark.parametrize(("key", "block", "stream"), STREAMS, ids=["1", "2", "3", "4"])
def test_masks_are_the_key_stream_of_RFC_8439(key, block, stream):
    for dtype, letter in ((np.uint32, "I"), (np.uint64, "Q")):
        per = 64 // np.dtype(dtype).itemsize
        words = mask(h(key), per * (block + 1), dtype)
        assert words.dtype == dtype
        assert words.dtype.isnative
        assert words[per * block :].tolist() == list(struct.unpack(f"<{per}{letter}", h(stream)))


@given(keys, st.integers(0, 40))
def test_masks_are_those_of_the_naive_twin(key, count):
    stream = chacha20(key, 5)
    assert mask(key, count, np.uint64).tolist() == list(struct.unpack(f"<{count}Q", stream[: 8 * count]))
    assert mask(key, count, "u4").tolist() == list(struct.unpack(f"<{count}I", stream[: 4 * count]))


def test_a_mask_is_a_beginning_of_every_longer_one():
    key, long = bytes(range(32)), mask(bytes(range(32)), 50_000, np.uint64)
    for count in (1, 7, 8, 9, 4095, 49_999):
        np.testing.assert_array_equal(mask(key, count, np.uint64), long[:count])


def test_masks_have_two_kinds():
    for dtype in (np.int64, np.uint16, np.float64):
        with pytest.raises(ConfigError, match="uint32 or uint64"):
            mask(bytes(32), 4, dtype)
    with pytest.raises(SecurityError, match="a key is 32 bytes"):
        mask(bytes(31), 4, np.uint64)


def test_without_the_extra_the_error_names_it():
    code = """
        import sys
        sys.modules["cryptography"] = None
        import baffle.secagg.sharing
        from baffle.errors import MissingExtraError
        try:
            import baffle.secagg.primitives
        except MissingExtraError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "secure aggregation needs the package 'cryptography', which is not installed: "
        "pip install 'baffle-fl[secure]'\n"
    )
