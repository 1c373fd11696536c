"""The offline check: what a plug-in's own operator list says about a trace, without the chip and without installing."""

from crosschip.qualify.offline.check import check_offline

__all__ = ["check_offline"]
