"""`rediss:` a log that is reached with TLS, over a real server with a certificate of a test's own authority."""

import contextlib
import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pushsvc.brokers.redis_reader import READER
from pushsvc.errors import BrokerUnavailable
from pushsvc.publisher import Publisher
from tests.support.brokers import Side, data, put
from tests.support.redis import Redis
from tests.support.server import free_port
from tests.support.wait import eventually

HOST = "127.0.0.1"


class Authority:
    """Issues certificates for HOST. `ca`: the file of its own one."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        basic, usage = x509.BasicConstraints(ca=True, path_length=None), x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False)
        subject = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        certificate = self._certificate(self._name, self._key, (basic, True), (usage, True), (subject, False))
        self.ca = self._write(f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self) -> tuple[Path, Path]:
        """The files of a certificate and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis")])
        certificate = self._certificate(subject, key, (names, False), (issuer, False))
        secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                                   serialization.NoEncryption())
        return (self._write("redis.pem", certificate.public_bytes(serialization.Encoding.PEM)),
                self._write("redis.key", secret))

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey,
                     *extensions: tuple[x509.ExtensionType, bool]) -> x509.Certificate:
        now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number(),
                                          now - day, now + day)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name: str, content: bytes) -> Path:
        path = self._directory / name
        path.write_bytes(content)
        return path


class Secured(NamedTuple):
    """A Redis that speaks TLS on `port`, and plainly on its own."""

    redis: Redis
    port: int
    authority: Authority

    def url(self, ca: Path | None) -> str:
        return f"rediss://{HOST}:{self.port}/0" + (f"?ssl_ca_certs={ca}" if ca is not None else "")


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    authority = Authority(tmp_path, "ours")
    certificate, key = authority.issue()
    port = free_port()
    args: list[Any] = ["--tls-port", port, "--tls-cert-file", certificate, "--tls-key-file", key,
                       "--tls-ca-cert-file", authority.ca, "--tls-auth-clients", "no"]
    with Redis(tmp_path / "redis", args=list(map(str, args))) as server:
        yield Secured(server, port, authority)


def test_over_tls_nothing_is_missing_or_doubled_also_after_breaks(secured: Secured) -> None:
    url = secured.url(secured.authority.ca)
    side, other = Side(url), Side(url)
    with contextlib.closing(side.broker), contextlib.closing(other.broker), Publisher(url) as publisher:
        for number in range(60):
            put(side, f"{number}" + "x" * 20_000, "abc"[number % 3])
            if number % 20 == 10:
                secured.redis.break_listeners()
        with contextlib.closing(secured.redis.client()) as client:
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        eventually(lambda: publisher.publish("a", "60"))
        for each in (side, other):
            each.heard(61)
            assert [text.rstrip("x") for text in data(each)] == [str(number) for number in range(61)]
            assert len(each.resets) == 1, "nobody needs to know"
        assert len(side.history("a", "b", "c")) == 61


def test_a_server_of_another_authority_is_refused_and_told(secured: Secured, tmp_path: Path) -> None:
    for ca in (Authority(tmp_path, "another").ca, None):
        with Publisher(secured.url(ca)) as publisher, pytest.raises(BrokerUnavailable, match="certificate verify failed"):
            publisher.publish("a", "refused")
    side = Side(secured.url(ca))
    with contextlib.closing(side.broker):
        with pytest.raises(BrokerUnavailable, match="certificate verify failed"):
            put(side, "refused")
        assert "certificate verify failed" in str(side.broker._trouble.of(READER))  # type: ignore[attr-defined]
    with contextlib.closing(secured.redis.client()) as client:
        assert not client.exists("pushsvc:log")


def test_an_authority_that_is_no_file_is_told(secured: Secured, tmp_path: Path) -> None:
    url = secured.url(tmp_path / "none.pem")
    with Publisher(url) as publisher, pytest.raises(BrokerUnavailable, match="No such file"):
        publisher.publish("a", "refused")
