"""A payload signed with an Ed25519 key of the user's, in a DSSE envelope.

DSSE (Dead Simple Signing Envelope, the envelope of in-toto and Sigstore) holds exactly the bytes that were signed. No
canonical form of JSON is needed to check them, so neither floats nor key order can make a good signature fail, and any
tool that knows the format can check it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..reading import whole

if TYPE_CHECKING:  # an optional package that only signing needs
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PASSPHRASE = "DUALOPTIM_PASSPHRASE"  # the environment variable
ALGORITHM = "Ed25519"
MAKE = "openssl genpkey -algorithm ed25519 -out KEY.pem"
LARGEST_KEY = 2**16  # bytes; a file that is longer is no key


class Envelope(NamedTuple):
    """What a signed file holds: the bytes that were signed, the signature, and the id of the key that it names."""

    payload: bytes
    signature: bytes
    keyid: str


def load_private_key(path: str | Path, passphrase_file: str | Path | None = None) -> Ed25519PrivateKey:
    """The user's Ed25519 key, from PEM (PKCS #8) or OpenSSH's format.

    Args:
        path: the key's file.
        passphrase_file: file whose first line opens an encrypted key; without it, $DUALOPTIM_PASSPHRASE does.

    Raises:
        UserError: no such file, no private key, one of another kind, or encrypted and not opened.
    """
    _needs_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = _read(path, "key", f"make one with {MAKE}")
    if os.name == "posix" and Path(path).stat().st_mode & 0o077:
        warnings.warn(f"key {path}: other users of this machine may read it; chmod 600 {path}", stacklevel=2)
    if b"PRIVATE KEY-----" not in data:
        raise UserError(f"key {path}: holds no private key in PEM or OpenSSH's format; make one with {MAKE}")
    is_ssh = b"BEGIN OPENSSH PRIVATE KEY" in data
    load = serialization.load_ssh_private_key if is_ssh else serialization.load_pem_private_key
    try:
        try:
            key = load(data, None)
        except TypeError:  # raised for an encrypted key
            secret = _passphrase(path, passphrase_file)
            try:
                key = load(data, secret)
            except UnsupportedAlgorithm as error:
                if "bcrypt" not in str(error):
                    raise
                raise UserError(
                    f"key {path}: opening an encrypted OpenSSH key needs the package bcrypt; install dualoptim[certify]"
                ) from None
            except ValueError:
                raise UserError(f"key {path}: the passphrase does not open it; give the right one") from None
    except UserError:
        raise
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"key {path}: cannot be read ({str(error).rstrip('.')}); make one with {MAKE}") from None
    if not isinstance(key, Ed25519PrivateKey):
        kind = type(key).__name__.removesuffix("PrivateKey").removeprefix("_")
        raise UserError(f"key {path}: is of the kind {kind}, and records are signed with Ed25519; make one with {MAKE}")
    return key


def _passphrase(path: str | Path, file: str | Path | None) -> bytes:
    """The passphrase of an encrypted key; it is not asked for at the terminal, since a command may run unattended."""
    if file is not None:
        secret = (_read(file, "passphrase_file", "give the file that holds it").splitlines() or [b""])[0]
    else:
        secret = os.environ.get(PASSPHRASE, "").encode()
    if not secret:
        where = f"passphrase_file {file} is empty" if file is not None else f"${PASSPHRASE} is not set"
        raise UserError(f"key {path}: is encrypted and {where}; set ${PASSPHRASE} or give --passphrase-file FILE")
    return secret


def load_public_key(path: str | Path) -> Ed25519PublicKey:
    """Somebody's public Ed25519 key, from PEM or a line of OpenSSH's format."""
    _needs_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    data = _read(path, "public_key", "give the public key of whoever signed")
    if b"PRIVATE KEY-----" in data:
        raise UserError(
            f"public_key {path}: holds a private key; give the public one, made by "
            f"openssl pkey -in {path} -pubout -out PUB.pem"
        )
    is_ssh = data.lstrip().startswith((b"ssh-", b"ecdsa-", b"sk-"))
    try:
        key = (serialization.load_ssh_public_key if is_ssh else serialization.load_pem_public_key)(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"public_key {path}: is no public key in PEM or OpenSSH's format ({error})") from None
    if not isinstance(key, Ed25519PublicKey):
        kind = type(key).__name__.removesuffix("PublicKey").removeprefix("_")
        raise UserError(f"public_key {path}: is of the kind {kind}, and records are signed with Ed25519; give that key")
    return key


def public_bytes(key: Ed25519PublicKey) -> bytes:
    """A public key as DER (SubjectPublicKeyInfo), which `openssl pkey -pubin -outform DER` writes too."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def key_of(der: bytes) -> Ed25519PublicKey | None:
    """The public key in DER, if it is an Ed25519 key."""
    _needs_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, Ed25519PublicKey) else None


def fingerprint(key: Ed25519PublicKey) -> str:
    """The SHA-256 of a public key's DER, in hexadecimal."""
    return hashlib.sha256(public_bytes(key)).hexdigest()


def signed_bytes(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: "DSSEv1", and the lengths and bytes of type and payload.

    >>> signed_bytes(b"{}")
    b'DSSEv1 28 application/vnd.in-toto+json 2 {}'
    """
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def sealed(payload: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """A payload in its signed envelope."""
    signature = key.sign(signed_bytes(payload))
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": fingerprint(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def opened(path: str | Path) -> Envelope:
    """Read an envelope; its signature is not checked.

    Raises:
        UserError: it is not an envelope with one signature, or holds another type of payload.
    """
    try:
        data = whole(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of dualoptim certify") from None
    found = parsed(data, str(path))
    if not isinstance(found, dict) or set(found) != {"payloadType", "payload", "signatures"}:
        raise UserError(f"{path}: is no record of dualoptim certify, which has payloadType, payload and signatures")
    if found["payloadType"] != PAYLOAD_TYPE:
        raise UserError(f"{path}: its payloadType is {found['payloadType']!r} and should be {PAYLOAD_TYPE!r}")
    signatures = found["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        count = len(signatures) if isinstance(signatures, list) else "no list of"
        raise UserError(f"{path}: has {count} signatures; a record of dualoptim certify has one")
    if not isinstance(signatures[0], dict) or set(signatures[0]) != {"keyid", "sig"}:
        raise UserError(f"{path}: its signature should have keyid and sig, and nothing else")
    payload, signature = (decoded(text, str(path)) for text in (found["payload"], signatures[0]["sig"]))
    return Envelope(payload, signature, str(signatures[0]["keyid"]))


def is_signed_by(envelope: Envelope, key: Ed25519PublicKey) -> bool:
    """Whether an envelope was signed with the private key of a public one, and names that key."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(envelope.signature, signed_bytes(envelope.payload))
    except InvalidSignature:
        return False
    return envelope.keyid == fingerprint(key)


def canonical(value: Any) -> bytes:
    """JSON in UTF-8 with sorted keys and no spaces; numbers that are not finite are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def parsed(data: bytes, where: str) -> Any:
    """Parse JSON in which no key is repeated and there is no NaN, so that no two readers understand it differently."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is damaged, cut off or no record ({error}); fetch it again") from None


def decoded(text: Any, where: str) -> bytes:
    """The bytes of base64 text, which must be in its only canonical form, so that every change is noticed."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
        if base64.b64encode(data).decode() == text:
            return data
    except (AttributeError, UnicodeEncodeError, binascii.Error):
        pass
    raise UserError(f"{where}: is damaged: what should be base64 is not; fetch it again")


def _read(path: str | Path, what: str, mend: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST_KEY + 1)
    except OSError as error:
        raise UserError(f"{what} {path}: cannot be read ({error.strerror}); {mend}") from None
    if len(data) > LARGEST_KEY:
        raise UserError(f"{what} {path}: is longer than any key; {mend}")
    return data


def _needs_cryptography() -> None:
    try:
        import cryptography.hazmat.primitives  # noqa: F401
    except ImportError:
        raise UserError("signing needs the package cryptography; install dualoptim[certify]") from None
