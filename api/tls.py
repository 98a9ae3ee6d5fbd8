"""TLS of the TCP listener: certificate, key and the callers' authority from files that may be replaced at any time."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from api.listen import CannotListen

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. With ``client_ca``, only callers whose certificate that authority signed are let in (mTLS)."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def load(self) -> ssl.SSLContext:
        """What a connection needs, from the files as they are now; raises CannotListen."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # Nobody resumes a session: its caller would be let in without showing a certificate, whose authority may have
        # been withdrawn meanwhile. TLS 1.2 resumes by numbers that OpenSSL remembers, too, which Python cannot forbid.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
        try:
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:  # ssl.SSLError is one
            raise CannotListen(f"TLS files ({self.cert}, {self.key}, {self.client_ca}): {error}") from error
        return context

    def seen(self) -> tuple[object, ...]:
        """What changes whenever a file is replaced."""
        return tuple(_stamp(path) for path in (self.cert, self.key, self.client_ca) if path is not None)


@dataclass(frozen=True)
class Exposure:
    """How the TCP listener is secured besides the token. ``rate``: requests a second of one caller, and at once."""

    tls: TlsFiles | None = None
    anywhere: bool = False
    rate: tuple[float, float] = (50.0, 100.0)

    @property
    def mutual(self) -> bool:
        """Whether callers must show a certificate."""
        return self.tls is not None and self.tls.client_ca is not None


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def reloading(files: TlsFiles) -> ssl.SSLContext:
    """A context that looks at the files anew with each connection; while they cannot be used, the last ones hold.

    OpenSSL asks for the server's name before it chooses a certificate or judges the caller's, whether the caller names
    one or not; the context that is put in place then decides both. Raises CannotListen for files that cannot be used
    now.
    """
    listening = files.load()
    current, seen = listening, files.seen()

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal current, seen
        if (now := files.seen()) != seen:
            seen = now
            try:
                current = files.load()
            except CannotListen as error:
                log.error("%s; the ones before are still in use", error)
        connection.context = current

    listening.sni_callback = choose
    return listening
