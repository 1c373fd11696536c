"""The certificate beside a model's files, as every room may read it: its form, its signature, what it covers.

Nothing here needs torch, and nothing computes: a machine that only stores or serves the files can verify them.
The making of a certificate is `crosschip.handoff.certificate`.
"""

from crosschip.certificate.coverage import Serving, Status, chip_kind, status_of
from crosschip.certificate.document import CERTIFICATE_FILE, SCHEMA_VERSION, Certificate, read_certificate
from crosschip.certificate.verifying import Verification, verify

__all__ = [
    "CERTIFICATE_FILE",
    "SCHEMA_VERSION",
    "Certificate",
    "Serving",
    "Status",
    "Verification",
    "chip_kind",
    "read_certificate",
    "status_of",
    "verify",
]
