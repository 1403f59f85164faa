"""A private certificate authority for the test servers and their clients."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True, slots=True)
class Certificate:
    """Where a certificate and its key are, both PEM."""

    file: Path
    key: Path


class Authority:
    """
    Signs certificates for loopback servers and for clients; all files are in one folder.

    Attributes:
        file: Its own certificate, which whoever trusts it is given.
    """

    def __init__(self, folder: Path, name: str = "keybroker test CA") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        usage = x509.KeyUsage(
            *(False, False, False, False, False),  # of the nine, it only signs certificates
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = self._certificate(self._name, self._key, timedelta(days=30))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        self.file = self._write("ca.pem", builder.add_extension(usage, True))

    def server(self, name: str = "server") -> Certificate:
        """Certify a server at 127.0.0.1 and localhost."""
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        hosts = x509.SubjectAlternativeName([x509.DNSName("localhost"), address])
        return self._issue(name, timedelta(days=1), ExtendedKeyUsageOID.SERVER_AUTH, hosts)

    def client(self, name: str, lifetime: timedelta = timedelta(days=1)) -> Certificate:
        """Certify a client; `name` is its common name."""
        return self._issue(name, lifetime, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _issue(
        self,
        name: str,
        lifetime: timedelta,
        purpose: x509.ObjectIdentifier,
        *extensions: x509.ExtensionType,
    ) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._certificate(_named(name), key, lifetime)
        for extension in (x509.ExtendedKeyUsage([purpose]), *extensions):
            builder = builder.add_extension(extension, critical=False)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        key_file = self._folder / f"{name}.key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(pem)
        return Certificate(self._write(f"{name}.pem", builder), key_file)

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        theirs = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=1))
            .not_valid_after(now + lifetime)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(theirs, False)
        )

    def _write(self, name: str, builder: x509.CertificateBuilder) -> Path:
        signed = builder.sign(self._key, hashes.SHA256())
        file = self._folder / name
        file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        return file


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
