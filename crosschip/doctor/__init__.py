"""The doctor: looks at drivers, SDKs, plug-ins and versions before torch is imported, and says what to do.

Before, because a broken plug-in breaks `import torch` itself. This process never imports torch; a child does.
"""

from __future__ import annotations

from crosschip.doctor.checks import check_environment
from crosschip.doctor.environment import gather_environment
from crosschip.doctor.importing import IMPORT_DEADLINE_S, check_import
from crosschip.doctor.report import Finding, Report, print_report

__all__ = ["Finding", "Report", "examine", "print_report"]


def examine(import_deadline_s: float = IMPORT_DEADLINE_S) -> Report:
    """Everything the doctor finds out about this interpreter's environment. Changes nothing."""
    environment = gather_environment()
    findings = check_environment(environment)
    if "torch" in environment.versions:
        findings += check_import(environment, import_deadline_s)
    return Report(findings)
