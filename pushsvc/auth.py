"""Access: one place decides who may subscribe and publish. Closed by default.

Without a key the service is open to this machine only, unless `PUSHSVC_AUTH=none` says that something else guards it.
With a key every request brings a token (JWT, RFC 7519) as a bearer (RFC 6750), in the query or in a cookie.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pushsvc.bind import is_loopback
from pushsvc.errors import Forbidden, SettingsError, Unauthorized
from pushsvc.settings import Settings

COOKIE = "pushsvc_token"
QUERY = "access_token"
CLAIM = "pushsvc"
REALM = 'Bearer realm="pushsvc"'
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


@dataclass(frozen=True, slots=True)
class Grant:
    """What one request may do. user: the token's `sub`, None without a token. subscribe, publish: topics, each exact
    or a prefix that ends in `*`. expires: seconds since 1970, 0 for never."""

    user: str | None
    subscribe: tuple[str, ...]
    publish: tuple[str, ...]
    expires: float = 0

    def allow_subscribe(self, topics: Iterable[str]) -> None:
        """Raises Forbidden naming the first topic that is not granted."""
        _allow("subscribe to", self.subscribe, topics)

    def allow_publish(self, topics: Iterable[str]) -> None:
        _allow("publish to", self.publish, topics)


EVERYTHING = Grant(None, ("*",), ("*",))


class Access:
    """Decides by the settings. Raises SettingsError where the key and the algorithms do not fit each other."""

    def __init__(self, settings: Settings) -> None:
        self.keyed = bool(settings.jwt_key)
        self.open_to_all = settings.auth == "none" and not self.keyed
        self.origins = frozenset(settings.origins)
        if self.keyed:
            self._key, fitting = _load(settings.jwt_key)
            self._algorithms = _algorithms(settings.jwt_algorithms, fitting)

    def admit(self, authorization: str | None, query: str | None, cookie: str | None, peer: str) -> Grant:
        """The grant of a request. `peer`: its address. Raises Unauthorized."""
        if self.keyed:
            return self._grant(_bearer(authorization) or query or cookie or "")
        if self.open_to_all or is_loopback(peer):
            return EVERYTHING
        raise Unauthorized("without a key the service is open on loopback only", {"WWW-Authenticate": REALM})

    def _grant(self, token: str) -> Grant:
        if not token:
            # "If the request lacks any authentication information […] the resource server SHOULD NOT include an error
            # code" (RFC 6750, section 3.1)
            raise Unauthorized("a token is needed: Authorization: Bearer …", {"WWW-Authenticate": REALM})
        try:
            claims = jwt.decode(token, self._key, algorithms=self._algorithms,
                                options={"require": ["exp", "sub"], "verify_aud": False})
            expires = float(claims["exp"])
            claims["sub"].encode()  # a lone surrogate, which JSON can hold, has no bytes
        except (jwt.InvalidTokenError, OverflowError, UnicodeEncodeError) as error:
            raise _invalid(str(error)) from None
        rights = claims.get(CLAIM, {})
        if not isinstance(rights, dict):
            raise _invalid(f"the claim {CLAIM} is no object")
        return Grant(claims["sub"], _patterns(rights, "subscribe"), _patterns(rights, "publish"), expires)


def _bearer(authorization: str | None) -> str:
    if not authorization:
        return ""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _load(key: str) -> tuple[Any, tuple[str, ...]]:
    """The key as the JWT library takes it, prepared once, and the algorithms that fit it, the usual one first."""
    if "-----BEGIN" not in key:
        return key.encode(), ("HS256", "HS384", "HS512")
    try:
        loaded = load_pem_public_key(key.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SettingsError(f"PUSHSVC_JWT_KEY is no public key in PEM: {error}") from None
    if isinstance(loaded, rsa.RSAPublicKey):
        return loaded, ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
    if isinstance(loaded, ec.EllipticCurvePublicKey) and loaded.curve.name in _CURVES:
        return loaded, (_CURVES[loaded.curve.name],)
    if isinstance(loaded, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
        return loaded, ("EdDSA",)
    raise SettingsError("PUSHSVC_JWT_KEY is a public key of a kind that is not supported")


def _algorithms(asked: str, fitting: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in fitting:
            raise SettingsError(f"PUSHSVC_JWT_ALGORITHMS has {name!r}; with this key it may name {', '.join(fitting)}")
    return names or [fitting[0]]


def _patterns(rights: dict[str, Any], verb: str) -> tuple[str, ...]:
    patterns = rights.get(verb, [])
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise _invalid(f"{CLAIM}.{verb} is no list of topics")
    return tuple(patterns)


def _invalid(why: str) -> Unauthorized:
    # "must not include characters outside the set %x20-21 / %x23-5B / %x5D-7E" (RFC 6750, section 3); a token says these
    quoted = re.sub(r"[^ !#-\[\]-~]", "?", why)
    return Unauthorized(f"the token does not hold: {why}",
                        {"WWW-Authenticate": f'{REALM}, error="invalid_token", error_description="{quoted}"'})


def _allow(verb: str, patterns: tuple[str, ...], topics: Iterable[str]) -> None:
    for topic in topics:
        if not any(topic == each or (each.endswith("*") and topic.startswith(each[:-1])) for each in patterns):
            raise Forbidden(f"the token does not allow to {verb} {topic!r}",
                            {"WWW-Authenticate": f'{REALM}, error="insufficient_scope"'})
