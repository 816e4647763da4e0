"""Certificates of hardware makers: root, issuer, leaf. The root is pinned; revocation lists are not read."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from baffle.enclave.evidence import AttestationError


def checked(root: bytes, issuer: bytes, leaf: bytes) -> x509.Certificate:
    """The leaf, in whose issuer the pinned root vouches. All three are DER.

    Raises AttestationError where one is no certificate, is out of date, or was not issued by the one before.
    """
    try:
        chain = [x509.load_der_x509_certificate(data) for data in (root, issuer, leaf)]
        now = datetime.datetime.now(datetime.UTC)
        for certificate in chain:
            if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
                raise ValueError("out of date")
        if not chain[1].extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise ValueError("its issuer may not issue any")
        chain[1].verify_directly_issued_by(chain[0])
        chain[2].verify_directly_issued_by(chain[1])
    except Exception as error:  # a parser of others' certificates raises much; none of it is trust
        raise AttestationError(
            f"a certificate that cannot be trusted: {error or type(error).__name__}"
        ) from error
    return chain[2]


def key_of(leaf: x509.Certificate, curve: type[ec.EllipticCurve]) -> ec.EllipticCurvePublicKey:
    """The leaf's public key. AttestationError for one that is not on ``curve``."""
    try:
        key = leaf.public_key()
    except Exception as error:  # as above
        raise AttestationError(f"a certificate of no known key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, curve):
        raise AttestationError(f"a certificate of another key than one on {curve.name}")
    return key
